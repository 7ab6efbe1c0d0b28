"""What a recipe may not say whose update promises that no single record shows in the student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from accelerate.tracking import GeneralTracker

from opd.choice import Choice, choices_of, kind_of, nested
from opd.curricula import Curriculum
from opd.errors import RecipeError
from opd.objectives import Objective
from opd.remote.client import LOOPBACK
from opd.remote.settings import Reached
from opd.shaping import Shaping

if TYPE_CHECKING:
    from opd.recipe.tree import Recipe

LOCAL_TRACKERS = ("tensorboard",)
"""Those that write into the run directory and send nothing."""


def check_private(recipe: Recipe) -> None:
    """Raise `ValueError` for the first thing in a recipe that breaks the promise, or that shows records to somebody
    who is not named in `update.reveals`."""
    if not recipe.update.private:
        return
    for problem in (*_broken(recipe), *_shown(recipe)):
        raise ValueError(f"update {kind_of(recipe.update)!r} {problem}")


def check_live_trackers(recipe: Recipe, given: Iterable[GeneralTracker]) -> None:
    """Raise `RecipeError` for the first of the trackers from Python that a private recipe lets see nothing."""
    if not recipe.update.private or "trackers" in recipe.update.revealed:
        return
    sending = [each.name for each in given if each.name not in LOCAL_TRACKERS]
    if sending:
        raise RecipeError(
            f"update {kind_of(recipe.update)!r} keeps what it measures of records on this machine, and tracker "
            f"{sending[0]!r} of callbacks may send it on; leave it out, or say that it may: {_saying('trackers')}"
        )


def _broken(recipe: Recipe) -> Iterator[str]:
    """What makes the accounted epsilon untrue."""
    if not recipe.curriculum.independent:
        able = ", ".join(kind for kind, each in choices_of(Curriculum).items() if each.independent)  # type: ignore[attr-defined]
        yield (
            f"accounts for draws in which each record is by itself, and curriculum {kind_of(recipe.curriculum)!r} "
            f"draws otherwise; set curriculum: {able}"
        )
    if recipe.batch.group > 1:
        yield (
            f"bounds what one trajectory adds, and batch.group={recipe.batch.group} gives a record several; set "
            "batch.group=1"
        )
    coupled: list[Objective | Shaping] = [*recipe.objective, *recipe.shaping]
    for part in coupled:
        if not part.alone:
            axis: type[Choice] = Objective if isinstance(part, Objective) else Shaping
            able = ", ".join(kind for kind, each in choices_of(axis).items() if each.alone)  # type: ignore[attr-defined]
            yield (
                f"bounds what one record adds, and {axis.axis} {kind_of(part)!r} does not say that a trajectory's part "
                f"depends on that trajectory alone; those that do: {able}"
            )
    for objective in recipe.objective:
        if (objective.reduction or recipe.reduction) == "token_mean":
            yield (
                "divides by the prompts that a step has in expectation, and the mean over tokens by a number that "
                "hangs on all records of the step; set reduction=sequence_mean, or sequence_sum"
            )
    for key, chosen in (
        ("checkpoint.keep_best", recipe.checkpoint.keep_best),
        ("evaluation.stop", recipe.evaluation.stop),
    ):
        if chosen is not None and not recipe.evaluation.prompts:
            yield (
                f"does not account for a choice by held-out records, and {key} makes one; set evaluation.prompts to "
                "public prompts, or remove the key"
            )


def _shown(recipe: Recipe) -> Iterator[str]:
    """Who would see records. `update.reveals` names those who may."""
    remote = [url for part in nested(_blocks(recipe)) for url in _outside(part)]
    if remote and "servers" not in recipe.update.revealed:
        yield (
            f"keeps records on this machine, and {remote[0]} would be sent them; take a model here or a server at "
            f"127.0.0.1, or say that it may see them: {_saying('servers')}"
        )
    sending = [name for name in recipe.tracking.trackers if name not in LOCAL_TRACKERS]
    if sending and "trackers" not in recipe.update.revealed:
        yield (
            f"keeps what it measures of records on this machine, and tracker {sending[0]!r} would send it on; set "
            f"tracking.trackers to {list(LOCAL_TRACKERS)} or [], or say that it may: {_saying('trackers')}"
        )
    if not recipe.evaluation.prompts and "held_out" not in recipe.update.revealed:
        yield (
            "does not account for measurements, and evaluation.held_out takes records to measure and to show in "
            "samples.jsonl; set evaluation.prompts to public prompts, or say that these may be seen: "
            f"{_saying('held_out')}"
        )
    taught = [part for part in nested(recipe.rollout) if getattr(part, "train", None) is not None]
    if taught and "rollouts" not in recipe.update.revealed:
        yield (
            "writes nothing of rollouts to the disk, and rollout.engine.train has a drafter learn from them without "
            "noise, which is saved beside the student; remove it, or say that rollouts may be written: "
            f"{_saying('rollouts')}"
        )
    cached = [part for part in nested(recipe.teacher) if getattr(part, "cache", None) is not None]
    if cached and "rollouts" not in recipe.update.revealed:
        yield (
            "writes nothing of rollouts to the disk, and teacher.cache keeps answers about them; remove it, or say "
            f"that rollouts may be written: {_saying('rollouts')}"
        )


Revealed = Literal["servers", "trackers", "held_out", "rollouts"]
"""Servers on other machines, trackers that send, held-out records in measurements and samples, rollouts on the disk."""


def _saying(what: Revealed) -> str:
    return f"update.reveals=[{what}]"


def _outside(part: object) -> list[str]:
    """Addresses on other machines, where a part is a server's."""
    urls = part.url if isinstance(part, Reached) else []
    return [url for url in urls if urlsplit(url).hostname not in LOOPBACK]


def _blocks(recipe: Recipe) -> list[Any]:
    return [getattr(recipe, name) for name in type(recipe).model_fields]
