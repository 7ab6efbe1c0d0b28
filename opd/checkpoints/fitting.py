"""Whether the state in a checkpoint can be taken up by a recipe that changed since, as far as shows before that."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd.checkpoints.store import STATE
from opd.errors import OpdError
from opd.policies.base import LIVE

if TYPE_CHECKING:
    from opd.recipe import Recipe

PARTS = {
    "curriculum": "course",
    "rollout": "rollout",
    "shaping": "shaping",
    "teacher": "teachers",
    "update": "optimiser",
}
"""What the parts of a run are called in its state, by the recipe's key."""


def unfit(keys: Sequence[str], before: Mapping[str, Any], recipe: Recipe, folder: Path) -> str | None:
    """Why a recipe, in which `keys` are others than in the one of `before`, cannot go on from the checkpoint in
    `folder`, however much that is wanted; None where it may. No weights are read."""
    parts = json.loads((folder / STATE).read_bytes())["parts"]
    for key in keys:
        axis, *inner = key.split(".")
        number = f".{inner.pop(0)}" if inner and inner[0].isdecimal() else ""
        held = parts.get(f"{PARTS.get(axis)}{number}")
        # Another choice keeps another state, and so does another mode of a teacher, and another optimiser.
        if held and inner in (["kind"], ["mode"], ["optimizer"]):
            return f"what it holds of {axis}{number} is of another {inner[0]}"
        if key == "update.average" and not before["update"].get("average"):
            return "it holds no mean of the weights"
    if not any(key.startswith("student.") for key in keys) or getattr(recipe.student, "model", None) == LIVE:
        return None
    try:
        model = recipe.student.shape([]).model
    except OpdError:
        # What is wrong with the student is told where it is loaded.
        return None
    return misfit(model.parameters(), folder) if isinstance(model, torch.nn.Module) else None


def misfit(parameters: Iterable[torch.nn.Parameter], folder: Path) -> str | None:
    """How the trained ones of a student's parameters, by their shapes, are others than those in a checkpoint."""
    held = json.loads((folder / STATE).read_bytes())["parts"]["optimiser"].get("shapes")
    here = Counter(tuple(p.shape) for p in parameters if p.requires_grad)
    if not held or not here:
        return None
    there = Counter(tuple(shape) for shape in held.values())
    if here == there:
        return None
    one, other = (next(iter(a - b), None) for a, b in ((there, here), (here, there)))
    shapes = " and ".join(f"{list(s)} {where}" for s, where in ((one, "there"), (other, "here")) if s is not None)
    return f"its weights are not those of such a student ({shapes} alone)"
