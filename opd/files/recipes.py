"""A recipe's file: found by path or name, and read as YAML within bounds (a text that would never end is refused).

Nothing heavy is imported here, so that a command tells of a mistyped name or a broken file before it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from opd.errors import RecipeError, nearest

LARGEST = 16 * 2**20
"""Bytes of a recipe; prompts in great numbers are a file of their own."""
COPIES = 100_000
"""Values that aliases may stand for in all."""


class _Refused(yaml.MarkedYAMLError):
    """What YAML allows and a recipe does not."""


class _Loader(yaml.SafeLoader):
    """YAML, with duplicate keys refused instead of the last one winning, and without merges of mappings (`<<`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _Refused(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise _Refused(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_text(path: Path) -> str:
    """A recipe's text.

    Raises:
        RecipeError: a file that cannot be read, or that is none.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise RecipeError(
                f"{path}: {size / 2**20:.0f} MiB are more than a recipe of {LARGEST // 2**20} MiB; put prompts into a "
                "file of their own (prompts: {path: ...})"
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None


def read_plain(text: str, where: str | Path) -> Any:
    """The data of a YAML text, in which aliases of one anchor are separate, so that an override changes one place only.

    Raises:
        RecipeError: text that is no YAML, or that a recipe cannot be; `where` and the line are named.
    """
    try:
        return _unshared()(yaml.load(text, Loader=_Loader))
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply, or an anchor contains itself") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else str(where)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{line}: not valid YAML ({problem[:160]}); quote what is meant as text") from None
    except (ValueError, OverflowError, KeyError) as error:
        # Dates and numbers that look like ones and are none: 2024-13-45.
        problem = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise RecipeError(f"{where}: not valid YAML ({problem}); quote what is meant as text") from None


def _unshared() -> Callable[[Any], Any]:
    seen: set[int] = set()
    copied = 0

    def copy(value: Any, again: bool = False) -> Any:
        nonlocal copied
        if not isinstance(value, dict | list):
            return value
        again = again or id(value) in seen
        seen.add(id(value))
        if again:
            copied += 1 + len(value)
            if copied > COPIES:
                raise _Refused(problem="its aliases stand for too many values")
        if isinstance(value, dict):
            return {key: copy(item, again) for key, item in value.items()}
        return [copy(item, again) for item in value]

    return copy


def recipe_folder() -> Path:
    """Where the recipes that come with `opd` lie: in the wheel, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "_recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(reference: str) -> Path:
    """A path, or the name of a shipped recipe (`quickstart`, `recipes/quickstart.yaml`)."""
    path = Path(reference)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path.stem in shipped and path.parent.as_posix() in (".", "recipes"):
        return shipped[path.stem]
    known = "give a YAML file, or one of those that opd recipes lists"
    if path.is_dir():
        inside = path / "recipe.yaml"
        raise RecipeError(
            f"{reference!r} is a folder and no recipe; its recipe is {inside}"
            if inside.is_file()
            else f"{reference!r} is a folder without recipe.yaml, so no run of opd; {known}"
        )
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        raise RecipeError(f"{str(path.absolute())!r} does not exist{nearest(path.stem, shipped)}; {known}")
    raise RecipeError(
        f"no recipe {reference!r}{nearest(path.stem, shipped)}; give a YAML file or one of {', '.join(shipped)}"
    )


def read_recipe(reference: str, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Where a recipe lies and its plain data, not validated yet and without the overrides, of which the form is
    checked.

    Raises:
        RecipeError: no such recipe, a file that is none, or an override that is none.
    """
    path = find_recipe(reference)
    data = read_plain(read_text(path), path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this file holds {type(data).__name__}")
    for override in overrides:
        read_override(override)
    return path, data


def read_override(override: str) -> tuple[list[str], object]:
    """The key's parts and the value of `key.of.several=value`; the value is YAML.

    Raises:
        RecipeError: another form, or a value that is no YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {short(override)} is not of the form key=value, e.g. update.learning_rate=1e-4")
    try:
        return key.split("."), read_plain(text, "the value")
    except RecipeError as error:
        raise RecipeError(f"override {short(override)}: {error}") from None


def short(value: object) -> str:
    """A value as messages show it: one line of at most 60 characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."
