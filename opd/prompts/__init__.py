"""Where prompts come from."""

from opd.prompts.base import Prompt, Prompts, count_repeats, load_prompts, split_held_out

__all__ = ["Prompt", "Prompts", "count_repeats", "load_prompts", "split_held_out"]
