"""Reading a recipe: its file, overrides, validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from opd.choice import take_in
from opd.errors import RecipeError
from opd.files.places import anchored, home_of
from opd.files.recipes import read_override, read_recipe, recipe_folder, short
from opd.recipe.explaining import explain, spelt_out
from opd.recipe.tree import Recipe

NOT_SUGGESTED = {"description", "try_next", "resume", "checkpoint", "failures", "tracking", "hardware", "push_to"}
NOT_DESCRIBED = NOT_SUGGESTED | {"name", "output", "seed"}
"""Keys that may change while a recipe's `try_next`, or its `description`, stays true."""


def load_recipe(reference: str, overrides: Sequence[str] = (), *, recorded: bool = False) -> Recipe:
    """Read, override and validate a recipe; every mistake is a `RecipeError` that names the key and the file.

    Relative paths in a run's own recipe.yaml belong to the directory that the run was started in; those of overrides to
    the working directory.

    Args:
        recorded: as of `parse_recipe`.
    """
    path, data = read_recipe(reference, overrides)
    home = home_of(path)
    data = data if home is None else anchored(data, home)
    take_in()
    for override in overrides:
        apply_override(data, override)
    changed = {override.partition("=")[0].split(".")[0] for override in overrides}
    for text, spoken_of in (("description", changed - NOT_DESCRIBED), ("try_next", changed - NOT_SUGGESTED)):
        # What was said of the recipe as it stands is not said of another one.
        if spoken_of and text not in changed:
            data.pop(text, None)
    return parse_recipe(data, str(path), path.parent, recorded=recorded, overrides=overrides)


def parse_recipe(
    data: dict[str, Any],
    origin: str = "recipe",
    folder: Path | None = None,
    *,
    recorded: bool = False,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Validate plain data.

    Args:
        origin: what errors call it.
        folder: where relative data files are looked for after the working directory, and before the data that comes
            with `opd`, so that a copy of a shipped recipe finds them.
        recorded: it is what a run wrote down, to be read and not to be run again: functions from Python stand in it by
            their names.
        overrides: `key=value` that are in the data already; a mistake in one is told with it, and not with `origin`.
    """
    take_in()
    folders = [] if folder is None else [folder, recipe_folder()]
    try:
        return Recipe.model_validate(data, context={"folders": folders, "recorded": recorded})
    except ValidationError as error:
        raise RecipeError(explain(error, data, origin, overrides)) from None
    except RecursionError:
        raise RecipeError(f"{origin}: nested too deeply to be a recipe") from None


def json_schema() -> str:
    """JSON Schema of recipes, for editors."""
    take_in()
    return json.dumps(Recipe.model_json_schema(), indent=2)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set the place that `key.of.several=value` names; the value is YAML."""
    (*parents, leaf), value = read_override(override)
    place: Any = data
    for depth, part in enumerate(parents):
        at: Any = _index(part, place, override, parents[:depth]) if isinstance(place, list) else part
        following = place[at] if isinstance(place, list) else place.get(at)
        if isinstance(following, str):
            following = spelt_out(parents[: depth + 1], following)
        if not isinstance(following, dict | list):
            following = {}
        place[at] = following
        place = following
    if isinstance(place, list):
        place[_index(leaf, place, override, parents)] = value
    else:
        place[leaf] = value


def _index(part: str, items: list[Any], override: str, before: list[str]) -> int:
    if not items:
        raise RecipeError(f"override {short(override)}: {part!r} is an index into an empty list; give the whole list")
    if not part.isdecimal():
        named = ".".join(before)
        raise RecipeError(
            f"override {short(override)}: {named} is a list of {len(items)}, and an index from 0 to {len(items) - 1} "
            f"says of which: {named}.0.{part}"
        )
    if int(part) >= len(items):
        raise RecipeError(f"override {short(override)}: {part!r} must be an index from 0 to {len(items) - 1}")
    return int(part)
