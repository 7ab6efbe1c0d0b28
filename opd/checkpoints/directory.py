"""The directory of a run: which folders may be one, whether one holds a run, and how it is cleared for the next."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.checkpoints.store import FILES, LEFTOVER
from opd.errors import OVERWRITE, RESUME, RecipeError, RunError
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
    "curriculum.jsonl",
    "summary.json",
    "lm_eval.json",
    "privacy.json",
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
        RecipeError: no directory can have its name; or it is the working directory, one that holds it, or the home
            folder or one that holds that.
    """
    place = recipe.directory.resolve()
    try:
        recipe.directory.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        key, value = ("output", recipe.output) if recipe.output else ("name", recipe.name)
        raise RecipeError(f"{key} is {_short(str(value))}, which can be no directory here ({error.strerror})") from None
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
            f"{directory} holds a run already; go on with it by {RESUME}, choose another with output=PATH, "
            f"or pass {OVERWRITE}"
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


def must_clear(recipe: Recipe, overwrite: bool, unfinished: bool = False) -> bool:
    """Whether a recipe's directory holds an earlier run that `clear` has to remove once the new one stands.

    With `unfinished`, a run without checkpoints is to be cleared too, if it meant to write some and wrote no student:
    it was killed before its first.

    Raises:
        RunError: the directory holds a run and may not be overwritten, or something, in a place where a run's files
            lie, that no run wrote; or the recipe reads something in it that would be removed.
    """
    directory = recipe.directory
    if not main_process():
        return False
    refuse_links(directory)
    if unfinished and holds_run(directory):
        if (directory / "student").exists() or not _meant_to_write_checkpoints(directory):
            raise RunError(
                f"the run in {directory} has no checkpoint to go on from; "
                f"start again with {OVERWRITE}, or with output=PATH"
            )
        overwrite = True
    if not (overwrite and holds_run(directory)):
        refuse_occupied(directory)
        return False
    _refuse_inputs_of(recipe)
    if (directory / "student" / LIST).is_file() and not listed(directory / "student"):
        raise RunError(
            f"{directory / 'student'} was written by an earlier version of opd, which kept no list of its files; "
            "remove it by hand, or choose another directory with output=PATH"
        )
    others = [*foreign(directory / "student"), *_foreign_checkpoints(directory)]
    if others:
        raise RunError(
            f"the run in {directory} cannot be removed: {named(others)} was not written by opd; "
            "move it away, or choose another directory with output=PATH"
        )
    return True


def clear(directory: Path, keep: Collection[str] = ()) -> None:
    """Remove what the run in a directory wrote, as `must_clear` has found it, and nothing else; of its `RUN_FILES` not
    those of `keep`."""
    project = _project(directory)
    if project is not None:
        remove_files(project, [name for name in entries(project) if EVENTS.fullmatch(name)])
    for name in FOLDERS:
        found = list(entries(directory / name))
        remove_files(directory / name, sorted(found, key=lambda place: place in (LIST, "manifest.json")))
    # The recipe goes last: without it what is left is no run, and then nobody may remove it.
    for name in reversed([name for name in RUN_FILES if name not in keep]):
        (directory / name).unlink(missing_ok=True)


def _refuse_inputs_of(recipe: Recipe) -> None:
    """What lies among the earlier run's own files would be gone, the only copy of it perhaps."""
    place = recipe.directory.resolve()
    for key, value in plain_values(recipe.dump()):
        if key in ("name", "output", "description", "try_next") or not isinstance(value, str) or len(value) > 4096:
            continue
        found = Path(value).expanduser().resolve()
        if not found.exists() or place not in found.parents:
            continue
        if found.relative_to(place).parts[0] in (*RUN_FILES, *FOLDERS):
            raise RunError(
                f"{key} is {value!r}, which lies in {recipe.directory}, and that would be cleared for the new run; "
                "choose another directory with output=PATH"
            )


def plain_values(data: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """`(dotted key, value)` of everything in nested mappings and lists that is neither."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from plain_values(value, f"{prefix}{key}.")
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from plain_values(value, f"{prefix}{i}.")
    else:
        yield prefix.rstrip("."), data


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57] + "...")


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
