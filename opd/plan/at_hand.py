"""The prompts and stores of a recipe, as far as a plan can read them."""

from __future__ import annotations

from pathlib import Path

import torch

from opd.assembly import check_verdicts, load_data, not_held_out, readable, without_verdict
from opd.choice import nested
from opd.context import Context
from opd.errors import DataError
from opd.failures import skipped_rows
from opd.prompts import Prompt
from opd.recipe import Recipe
from opd.rollouts.stored import StoredRollout


def prompts_at_hand(recipe: Recipe, notes: list[str]) -> tuple[list[Prompt], list[Prompt]] | None:
    """`(training, held-out)` prompts, checked as a run does; None where they would have to be downloaded."""
    remote = [path for source in recipe.prompts if (path := source.remote) is not None]
    if remote:
        notes.append(f"{remote[0]}: not read; prompts are taken to be {recipe.max_prompt_tokens} tokens long")
        return None
    bad: list[DataError] = []
    training, held_out = load_data(recipe, bad)
    verifiers = [] if recipe.verifier is None else [recipe.verifier]
    training = readable(recipe, training, bad, None, *recipe.teacher, *verifiers)
    held_out = readable(recipe, held_out, bad, None, *recipe.teacher, *verifiers)
    notes += skipped_rows(bad) + not_held_out(recipe, training, held_out)
    context = Context(device=torch.device("cpu"), temperature=recipe.temperature, seed=recipe.seed, steps=recipe.steps)
    verifier = None if recipe.verifier is None else recipe.verifier.build(context)
    check_verdicts(recipe, verifier, training)
    notes += without_verdict(recipe, verifier, training)
    recipe.curriculum.build(training, recipe.batch.prompts, context)
    taken = recipe.steps * recipe.batch.prompts
    notes.append(f"{len(training)} prompts to train on, of which all steps take {taken}; {len(held_out)} held out")
    return training, held_out


def stores_not_here(recipe: Recipe) -> list[str]:
    """For people: the stores that the rollout reads its texts from and that are not on this machine; a run would be
    refused."""
    paths = [part.path for part in nested(recipe.rollout) if isinstance(part, StoredRollout)]
    return [
        f"{path}: its texts are read from the disk, and no store is there; opd rollout RECIPE --out {path} makes one"
        for path in paths
        if not (Path(path) / "store.json").is_file()
    ]
