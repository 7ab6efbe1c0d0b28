"""A teacher that is the student itself and sees what it sees teaches nothing: the divergence is zero from the start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd.policies.base import LIVE, Student
from opd.recipe import Recipe
from opd.teachers import LiveTeacher, Teacher
from opd.teachers.routed import RoutedTeacher
from opd.teachers.self_teacher import SelfTeacher
from opd.teachers.showing import ShowingTeacher

WEIGHTS = ("model", "adapter", "revision", "tokenizer")
"""Settings that say which weights a model has; dtypes differ by rounding only."""


def nothing_to_learn(recipe: Recipe, student: Student | None = None, teachers: Sequence[LiveTeacher] = ()) -> list[str]:
    """A warning where every teacher is the student under the student's own view, and nothing else teaches.

    Args:
        student: the built one, with `teachers`, the built ones, to compare their weights too; without them the recipe
            alone is looked at.
    """
    members = [m for teacher in recipe.teacher for m in _members(teacher)]
    if not members or not all(objective.needs_teacher for objective in recipe.objective):
        return []
    built = [m for teacher in teachers for m in teacher.members().values()]
    pairs = zip(members, built if len(built) == len(members) else [None] * len(members), strict=True)
    if not all(_same_view(recipe, m) and (_same_model(recipe, m) or _same_weights(student, b)) for m, b in pairs):
        return []
    which = "the teacher is" if len(members) == 1 else "all teachers are"
    return [
        f"{which} the student itself and no teacher sees more than it: the divergence is 0 and nothing is learnt. Give "
        "the teacher another model, or a view of its own (teacher.system, teacher.examples, teacher.sees)"
    ]


def _members(teacher: Teacher) -> list[Teacher]:
    return list(teacher.routes.values()) if isinstance(teacher, RoutedTeacher) else [teacher]


def _same_view(recipe: Recipe, teacher: Teacher) -> bool:
    if teacher.sees is not None or (isinstance(teacher, ShowingTeacher) and teacher.shows):
        return False
    own = recipe.student
    return all(getattr(teacher, k, None) == getattr(own, k, None) for k in ("template", "template_options")) or (
        isinstance(teacher, SelfTeacher)
    )


def _same_model(recipe: Recipe, teacher: Teacher) -> bool:
    if isinstance(teacher, SelfTeacher):
        return True
    theirs, own = getattr(teacher, "model", None), getattr(recipe.student, "model", None)
    if theirs is None or theirs == LIVE:
        return False
    same_place = theirs == own or (Path(theirs).is_dir() and Path(theirs).resolve() == Path(str(own)).resolve())
    rest = all(getattr(teacher, k, None) == getattr(recipe.student, k, None) for k in WEIGHTS[1:])
    dropped = [set(getattr(side, "drop_layers", ())) for side in (teacher, recipe.student)]
    return same_place and rest and dropped[0] == dropped[1]


def _same_weights(student: Any, teacher: Any) -> bool:
    """Whether two built language models hold the same numbers; new adapters change nothing and do not count."""
    mine, theirs = (getattr(side, "language", None) for side in (student, teacher))
    if mine is None or theirs is None:
        return False
    own, other = (
        {_plain(n): p.detach() for n, p in m.base.named_parameters() if "lora_" not in n} for m in (mine, theirs)
    )
    return own.keys() == other.keys() and all(_equal(p, other[n]) for n, p in own.items())


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a = a.to(b.device)
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))
