"""Which checkpoint a run goes on from, and whether it is the same run that goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from opd.checkpoints.content import content_of
from opd.checkpoints.fitting import unfit
from opd.checkpoints.store import UnusableError, folder_of, steps_stored, verify
from opd.errors import FORCE_CHANGED, OVERWRITE, RecipeError, RunError
from opd.files.places import DIRECTORY, PLACES, placed
from opd.prompts import Prompt
from opd.provenance import versions
from opd.recipe import Recipe, differences, parse_recipe

NO_DIFFERENCE = (
    "name",
    "description",
    "output",
    "resume",
    "checkpoint",
    "failures",
    "tracking",
    "push_to",
    "self_test",
    "try_next",
    "evaluation.samples",
    "evaluation.stop",
    "evaluation.alarm",
)
"""Keys that say what is kept and shown of a run, and change no number of its training."""

COUNTING = "counting_on_steps"
"""Fact of a recipe: its keys whose value at an early step depends on how many steps there are."""

ROUNDING = ("torch", "transformers", "accelerate", "peft")
"""Packages of which another version may round otherwise."""


def identity(recipe: Recipe, prompts: Iterable[Prompt]) -> dict[str, Any]:
    """What makes a run this run, as far as it can be known before models are loaded."""
    return {
        "recipe": recipe.dump(),
        "prompts": content_of(prompts, lambda p: [*recipe.rollout.files(p), *recipe.student.files(p)]),
        COUNTING: [key for key, schedule in recipe.scheduled().items() if schedule.counts_on_steps],
        DIRECTORY: os.getcwd(),
        "versions": {name: version for name, version in versions().items() if name in ROUNDING},
    }


def newest(
    recipe: Recipe, mine: Mapping[str, Any], force_changed: bool, warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """Folder and facts of the newest sound checkpoint in the recipe's directory; None where there is none at all.

    Args:
        mine: the `identity` of the run that wants to go on.
        force_changed: accept a recipe or prompts that changed since.
        warn: told in one line of each damaged checkpoint that was passed over.

    Raises:
        RunError: every checkpoint is damaged (with the reason of the newest), or the newest sound one belongs to a
            recipe that differs (with the keys), or is beyond the recipe's last step.
    """
    passed_over = []
    for step in steps_stored(recipe.directory):
        folder = folder_of(recipe.directory, step)
        try:
            facts = verify(folder)
        except UnusableError as error:
            passed_over.append(str(error))
            continue
        for reason in passed_over:
            warn(f"{reason}; going on from step {step} instead")
        found = [] if force_changed else changes(facts, mine)
        keys = [text.partition(" ")[0] for text in found]
        refuse_changes(found, folder, force_changed, unfit(keys, facts["recipe"], recipe, folder) if found else None)
        if facts["step"] > recipe.steps:
            raise RunError(
                f"steps is {recipe.steps}, and the run in {recipe.directory} has taken {facts['step']} steps already "
                f"({folder.name}); set steps to {facts['step']} or more, or start another run with output=PATH"
            )
        for package in (name for name in ROUNDING if facts["versions"].get(name) != mine["versions"].get(name)):
            warn(f"{folder.name} was written with {package} {facts['versions'].get(package)}: not bit for bit")
        return folder, facts
    if passed_over:
        raise RunError(f"no usable checkpoint: {passed_over[0]}. Start again with {OVERWRITE}, or with output=PATH")
    return None


def refuse_changes(found: list[str], folder: Path, force_changed: bool, unfit: str | None = None) -> None:
    """Raise `RunError` with what changed since a checkpoint was written, unless that is accepted; `unfit`: why it
    cannot be."""
    if found and not force_changed:
        shown = "; ".join(found[:6]) + (f"; {len(found) - 6} more" if len(found) > 6 else "")
        raise RunError(
            f"this is not the run of {folder}: {shown}.\n"
            + (
                f"Undo the change, start another run with output=PATH, or go on all the same with {FORCE_CHANGED}"
                if unfit is None
                else f"Undo the change, or start another run with output=PATH: the checkpoint does not fit, {unfit}"
            )
        )


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key old -> new` for all that differs between two identities and can change training."""
    found = []
    for key, old, new in differences(*map(_without_starts, (_as_of_today(then["recipe"]), now["recipe"]))):
        unrelated = any(key == name or key.startswith(f"{name}.") for name in NO_DIFFERENCE)
        if key == "steps":
            # How long a run is matters to a value that falls towards its end, and to nothing else.
            found += [f"steps {old} -> {new} (counted on by {', '.join(now[COUNTING])})"] if now[COUNTING] else []
        elif not unrelated and not _one_place(key, old, new, then, now):
            ends = key.rpartition(".")[2] in PLACES
            found.append(f"{key} {_short(old, ends)} -> {_short(new, ends)}")
    if then["prompts"] != now["prompts"] and not any(key.startswith(("prompts", "evaluation")) for key in found):
        found.append("the rows that prompts name have changed")
    for name in ("processes", "weights"):
        # Known only once the run is built.
        if name in now and then[name] != now[name]:
            parts = [part for part in now["weights"] if then["weights"].get(part) != now["weights"][part]]
            found.append(
                f"weights that training does not move have changed ({', '.join(parts)})"
                if name == "weights"
                else f"processes {then[name]} -> {now[name]}"
            )
    return found


def _one_place(key: str, old: Any, new: Any, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two words for a file or a folder, each of the directory that its process was started in, name one."""
    if key.rpartition(".")[2] not in PLACES or not (isinstance(old, str) and isinstance(new, str)):
        return False
    places = [placed(word, Path(facts.get(DIRECTORY, "."))) for word, facts in ((old, then), (new, now))]
    return places[0] == places[1] or (all(map(os.path.exists, places)) and os.path.samefile(*places))


def _as_of_today(recipe: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the defaults of keys that this version of opd has added."""
    try:
        return parse_recipe(recipe, recorded=True).dump()
    except RecipeError:
        return recipe


def _without_starts(value: Any) -> Any:
    """Without how servers are started, which changes no number that they answer."""
    if isinstance(value, list):
        return [_without_starts(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_starts(v) for k, v in value.items() if not (k == "start" and "url" in value)}


def _short(value: Any, end: bool = False) -> str:
    """At most 40 characters of a value: its beginning, or its `end`, in which paths differ."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else "..." + text[-37:] if end else text[:37] + "..."
