"""The prompts of a recipe, as far as a plan can read them."""

from __future__ import annotations

from opd.assembly import check_verdicts, load_data
from opd.prompts import Prompt
from opd.recipe import Recipe


def prompts_at_hand(recipe: Recipe, notes: list[str]) -> list[Prompt] | None:
    """Training and held-out prompts, checked as a run does; None where they would have to be downloaded."""
    remote = [path for source in recipe.prompts if (path := source.remote) is not None]
    if remote:
        notes.append(f"{remote[0]}: not read; prompts are taken to be {recipe.max_prompt_tokens} tokens long")
        return None
    training, held_out = load_data(recipe)
    check_verdicts(recipe, training)
    return [*training, *held_out]
