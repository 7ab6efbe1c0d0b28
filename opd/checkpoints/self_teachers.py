"""Teachers that are made of the student, made again after training: to measure a trained student against them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd.checkpoints.store import folder_of, read, steps_stored, verify
from opd.choice import nested
from opd.context import Context
from opd.errors import RunError
from opd.files.run_directory import read_json
from opd.hardware import check_device
from opd.policies.base import LIVE
from opd.teachers.base import LiveTeacher
from opd.teachers.self_teacher import SelfTeacher

if TYPE_CHECKING:
    from opd.recipe import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """Where a recipe's models lie in a single process.

    Raises:
        RecipeError: this machine has no such device.
    """
    check_device(recipe.hardware.device, "hardware.device")
    if recipe.hardware.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(recipe.hardware.device)


def self_teachers(trained: Recipe, run: Path | None) -> list[LiveTeacher] | None:
    """The teachers of a recipe as they were at the end of its training; None where none of them is the student itself,
    and so each is loaded as ever.

    A `frozen` one is the student that the recipe names; one that followed the student is in the run's last checkpoint.

    Args:
        run: directory of the training, if there is one.

    Raises:
        RunError: the student that training began with was passed from Python, is not the same any more, or no
            checkpoint of the end holds the teacher.
    """
    own = [part for part in nested(trained.teacher) if isinstance(part, SelfTeacher)]
    if not own:
        return None
    if getattr(trained.student, "model", None) == LIVE:
        raise RunError(
            "the teacher of this run was its student before training, which was passed from Python and is not here; "
            "summary.json has what was measured"
        )
    state: dict[str, Any] | None = None
    facts: dict[str, Any] = {}
    end = None if run is None else _last_step(run)
    if run is not None and end is not None:
        folder = folder_of(run, end)
        facts, state = verify(folder), read(folder)["parts"]
    if state is None and any(part.mode != "frozen" for part in own):
        raise RunError(
            "the teacher follows its student, and no checkpoint of the end of training holds it: it cannot be measured "
            "against; summary.json of the run has what was measured (checkpoint.every=0 keeps no checkpoint)"
        )
    context = Context(
        device=device_of(trained), temperature=trained.temperature, seed=trained.seed, steps=trained.steps
    )
    student = trained.student.build(context)
    built: list[LiveTeacher] = [teacher.build(context, student) for teacher in trained.teacher]
    parts: dict[str, Any] = {"student": student}
    if getattr(trained.student, "lora", None) is None:
        # A new adapter is drawn, and where it is drawn on another device by other numbers; it changes nothing yet.
        parts |= {f"teachers.{i}": teacher for i, teacher in enumerate(built)}
    for name, part in parts.items():
        if facts.get("weights", {}).get(name, part.fingerprint()) != part.fingerprint():
            raise RunError(
                f"the teacher of this run was made of {getattr(trained.student, 'model', 'its student')}, which holds "
                "other weights now; summary.json has what was measured"
            )
    for i, teacher in enumerate(built):
        name = f"teachers.{i}"
        if state is not None and name in state and hasattr(teacher, "load_state_dict"):
            teacher.load_state_dict(state[name])
    return built


def _last_step(run: Path) -> int | None:
    """The step at which a run ended, or has come to, if there is a checkpoint of it."""
    steps = steps_stored(run)
    done = read_json(run / "summary.json").get("steps", steps[0] if steps else None)
    return done if done in steps else None
