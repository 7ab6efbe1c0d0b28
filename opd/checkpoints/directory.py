"""The directory of a run: which folders may be one, whether one holds a run, and how it is cleared for the next."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.checkpoints.store import FILES, LEFTOVER
from opd.errors import RecipeError, RunError
from opd.files.ours import LIST, entries, foreign, listed, named, remove_files
from opd.files.run_directory import read_yaml
from opd.files.whole import main_process

if TYPE_CHECKING:
    from opd.recipe import Recipe

RUN_FILES = (
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "samples.jsonl",
    "rollouts.jsonl",
    "summary.json",
    "lm_eval.json",
    "report.html",
)
FOLDERS = ("student", "checkpoints")

RESOLVED = (
    "name",
    "seed",
    "steps",
    "student",
    "teacher",
    "prompts",
    "rollout",
    "objective",
    "update",
    "batch",
    "hardware",
)
"""Some of the keys that a whole resolved recipe has, and one that a person wrote hardly all."""

STEP = re.compile(r"step-\d{8,}")
EVENTS = re.compile(r"(.*/)?(events\.out\.tfevents\..+|hparams\.yml)")
"""What a tracker leaves in the folder of its project, where others may keep things too."""


def refuse_place(recipe: Recipe) -> None:
    """Refuse a run directory that holds other things by its nature.

    Raises:
        RecipeError: it is the working directory, one that holds it, or the home folder or one that holds that.
    """
    place = recipe.directory.expanduser().resolve()
    for other, what in ((Path.cwd(), "the working directory"), (Path.home().resolve(), "the home folder")):
        if place == other or place in other.parents:
            key, value = ("output", recipe.output) if recipe.output else ("name", recipe.name)
            held = what if place == other else f"a folder that holds {what}"
            raise RecipeError(
                f"{key} is {value!r}: {held} cannot be a run's directory; take one of its own, e.g. output=runs/a"
            )


def holds_run(directory: Path) -> bool:
    """Whether a directory has the resolved recipe that a run writes when it starts."""
    _, recipe = read_yaml(directory / "recipe.yaml")
    return all(key in recipe for key in RESOLVED)


def refuse_occupied(directory: Path) -> None:
    """Raise `RunError` for a directory that holds a run, or something by a name that a run writes to."""
    if holds_run(directory):
        raise RunError(
            f"{directory} holds a run already; go on with it by --resume, choose another with output=PATH, "
            "or pass --overwrite"
        )
    # Event files are added to what a tracker's folder holds.
    taken = [str(directory / name) for name in (*RUN_FILES, *FOLDERS) if _exists(directory / name)]
    if taken:
        raise RunError(
            f"{directory} holds no run of opd, and a run would write over {named(taken)}; "
            "choose another directory with output=PATH"
        )


def refuse_links(directory: Path) -> None:
    """Raise `RunError` for a run whose parts lie elsewhere: what is replaced or removed there may be another's."""
    links = [str(directory / name) for name in (*RUN_FILES, *FOLDERS) if (directory / name).is_symlink()]
    if links:
        raise RunError(
            f"{named(links)} is a link, and opd writes and removes in a run's own directory alone; put the whole "
            "directory where the link leads, with output=PATH"
        )


def prepare_directory(directory: Path, overwrite: bool, unfinished: bool = False) -> None:
    """Clear a run directory of the run that it holds; refuse one that holds a run unless `overwrite`.

    Nothing but what a run wrote is removed, and a directory with something that is not, in a place where a run's files
    lie, is refused whole.

    With `unfinished`, a run without checkpoints is cleared too, if it meant to write some and wrote no student: it was
    killed before its first.
    """
    if not main_process():
        return
    refuse_links(directory)
    if unfinished and holds_run(directory):
        if (directory / "student").exists() or not _meant_to_write_checkpoints(directory):
            raise RunError(
                f"the run in {directory} has no checkpoint to go on from; "
                "start again with --overwrite, or with output=PATH"
            )
        overwrite = True
    if not (overwrite and holds_run(directory)):
        refuse_occupied(directory)
        return
    if (directory / "student" / LIST).is_file() and not listed(directory / "student"):
        raise RunError(
            f"{directory / 'student'} was written by an earlier version of opd, which kept no list of its files; "
            "remove it by hand, or choose another directory with output=PATH"
        )
    project = _project(directory)
    others = [*foreign(directory / "student"), *_foreign_checkpoints(directory)]
    if others:
        raise RunError(
            f"the run in {directory} cannot be removed: {named(others)} was not written by opd; "
            "move it away, or choose another directory with output=PATH"
        )
    if project is not None:
        remove_files(project, [name for name in entries(project) if EVENTS.fullmatch(name)])
    for name in FOLDERS:
        found = list(entries(directory / name))
        remove_files(directory / name, sorted(found, key=lambda place: place in (LIST, "manifest.json")))
    # The recipe goes last: without it what is left is no run, and then nobody may remove it.
    for name in reversed(RUN_FILES):
        (directory / name).unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _project(directory: Path) -> Path | None:
    """Where the trackers of the run in a directory wrote, if that is a folder in it."""
    tracking: Any = read_yaml(directory / "recipe.yaml")[1].get("tracking")
    name = tracking.get("project") if isinstance(tracking, dict) else None
    plain = isinstance(name, str) and Path(name).name == name and name not in (*RUN_FILES, *FOLDERS, "", ".", "..")
    path = directory / str(name)
    return path if plain and path.is_dir() and not path.is_symlink() else None


def _foreign_checkpoints(directory: Path) -> list[str]:
    folder = directory / "checkpoints"
    if not folder.is_dir():
        return foreign(folder)
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        ours = STEP.fullmatch(path.name) or LEFTOVER.fullmatch(path.name)
        others += foreign(path, FILES) if ours else [str(path)]
    return others


def _meant_to_write_checkpoints(directory: Path) -> bool:
    block = read_yaml(directory / "recipe.yaml")[1].get("checkpoint")
    return bool(block.get("every")) if isinstance(block, dict) else False
