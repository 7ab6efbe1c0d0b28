"""Where prompts come from."""

from opd.prompts.base import Prompt, Prompts, load_prompts, split_held_out

__all__ = ["Prompt", "Prompts", "load_prompts", "split_held_out"]
