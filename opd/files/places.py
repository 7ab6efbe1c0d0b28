"""Where a recorded recipe's relative paths lead: they belong to the directory that its run was started in, wherever the
record is read. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.files.run_directory import read_json

DIRECTORY = "working_directory"
"""In environment.json and in a checkpoint's facts: where a recipe's relative paths belong."""

PLACES = frozenset({"adapter", "cache", "folder", "model", "path", "store", "tokenizer"})
"""Keys of a recipe that may name a file or a folder."""

OWN = "own:"
"""Before the place of a teacher's own tokenizer."""


def home_of(recipe: Path) -> Path | None:
    """The directory that the relative paths of a run's recipe.yaml belong to; None where they are read as they stand:
    it is the working directory, or gone, or the file is no run's record, or one of before this was written down."""
    if recipe.name != "recipe.yaml":
        return None
    return elsewhere(read_json(recipe.parent / "environment.json"))


def elsewhere(facts: Mapping[str, Any]) -> Path | None:
    """The directory of the facts of a run or of a checkpoint, unless it is the working directory, or gone."""
    named = facts.get(DIRECTORY)
    if not isinstance(named, str) or not Path(named).is_dir() or Path(named).samefile(Path.cwd()):
        return None
    return Path(named)


def anchored(recipe: Mapping[str, object], home: Path) -> dict[str, object]:
    """Plain data of a recorded recipe in which relative places that are there in the directory `home` are absolute.

    What is not there is left as it is: a name on the hub, or what is gone. So are rows of prompts that stand in the
    recipe, and the name by which a server knows its model.
    """
    served = "url" in recipe
    return {
        key: value
        if key == "add"
        else placed(value, home)
        if isinstance(value, str) and key in PLACES and not (served and key == "model")
        else _within(value, home)
        for key, value in recipe.items()
    }


def _within(data: object, home: Path) -> object:
    if isinstance(data, list):
        return [_within(item, home) for item in data]
    if not isinstance(data, dict) or data.get("kind") == "inline":
        return data
    return anchored(data, home)


def placed(value: str, home: Path) -> str:
    """The whole path of a relative place that is there in `home`; any other text as it is."""
    before, name = (OWN, value.removeprefix(OWN)) if value.startswith(OWN) else ("", value)
    if not name or name.startswith("~") or Path(name).is_absolute() or not (home / name).exists():
        return value
    return f"{before}{home / name}"
