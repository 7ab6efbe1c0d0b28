"""YAML of recipes and overrides as plain data, read within bounds: a text that would never end is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from opd.errors import RecipeError

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
