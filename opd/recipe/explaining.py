"""What is wrong with a recipe, said to a person: key, value, what is accepted, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from opd.choice import Choice, OneOf, Settings, choices_of
from opd.errors import nearest
from opd.policies import Policy
from opd.prompts import Prompts
from opd.recipe.tree import OfStudent, Recipe
from opd.teachers import Teacher


def explain(error: ValidationError, data: dict[str, Any], origin: str) -> str:
    """The first mistake in at most two lines: key, value, what is accepted, the fix; and how many more there are."""
    first = error.errors()[0]
    loc, kind = first["loc"], first["type"]
    key = _dotted(loc, data)
    more = error.error_count() - 1
    tail = f" ({more} more mistake{'s' if more > 1 else ''} in this recipe)" if more else ""
    if kind == "extra_forbidden" and (others := _of_others(loc)):
        value, kinds = short(first.get("input")), ", ".join(others)
        return f"{origin}: {key} is {value}: it is for students of kind {kinds}; remove the key{tail}"
    if kind == "extra_forbidden":
        return f"{origin}: unknown key {key!r}{_meant(loc, key)}{tail}"
    if kind == "missing":
        return f"{origin}: key {key!r} is required and missing{tail}"
    value = short(first.get("input"))
    if kind == "union_tag_invalid":
        expected = [e.strip(" '") for e in first["ctx"]["expected_tags"].split(",")]
        tag = first["ctx"]["tag"]
        place = _place_key(loc)
        if place and _names_a_place(tag):
            leaf = key.rsplit(".", 1)[-1]
            item = "-" if leaf.isdecimal() else f"{leaf}:"
            return f"{origin}: {key} is {short(tag)}, which is no kind; write {item} {{{place}: {tag}}}{tail}"
        return f"{origin}: {key}.kind is {tag!r}{nearest(str(tag), expected)}; accepted: {', '.join(expected)}{tail}"
    if kind == "union_tag_not_found":
        return f"{origin}: {key} is {value}; it needs a 'kind', one of {', '.join(_at(loc)[1])}{tail}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first.get("input"), date):
        message += "; quote what YAML takes for a date"
    if not loc:
        return f"{origin}: {message}{tail}"
    return f"{origin}: {key} is {value}: {message[:1].lower() + message[1:]}{tail}"


def short(value: object) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(loc: Sequence[int | str], data: Any) -> str:
    """The key as the user writes it: pydantic's location without the tags of unions and the index of a lone item."""
    keys: list[str] = []
    place = data
    for part, is_tag in _walk(loc):
        if is_tag or (isinstance(part, int) and not isinstance(place, list)):
            continue
        keys.append(str(part))
        if isinstance(place, dict):
            place = place.get(part)
        elif isinstance(place, list) and isinstance(part, int) and part < len(place):
            place = place[part]
        else:
            place = None
    return ".".join(keys) or "(the recipe)"


Blocks = tuple[type[BaseModel], ...]
"""What may stand at a place of a recipe; of several, the student says which."""


def _fields(blocks: Blocks) -> dict[str, FieldInfo]:
    return {name: info for block in blocks for name, info in block.model_fields.items()}


def _walk(loc: Sequence[int | str]) -> Iterator[tuple[int | str, bool]]:
    """`(part, whether it is the tag of a union)` for each part of a location."""
    blocks: Blocks = (Recipe,)
    kinds: dict[str, type[Choice]] = {}
    for part in loc:
        if isinstance(part, str) and part in kinds:
            blocks, kinds = (kinds[part],), {}
            yield part, True
            continue
        yield part, False
        if isinstance(part, str) and part in _fields(blocks):
            blocks, kinds = _models_in(_fields(blocks)[part])


def _annotations(annotation: Any) -> Iterator[Any]:
    yield annotation
    for arg in get_args(annotation):
        yield from _annotations(arg)


def _axes_in(metadata: Sequence[Any]) -> Iterator[type[Choice]]:
    for item in metadata:
        if isinstance(item, OneOf):
            yield item.axis


def _models_in(info: FieldInfo) -> tuple[Blocks, dict[str, type[Choice]]]:
    """What a field holds: a settings block, or the choices of an axis."""
    found = [*info.metadata]
    for annotation in _annotations(info.annotation):
        found += getattr(annotation, "__metadata__", ())
    for item in found:
        if isinstance(item, OfStudent):
            return item.blocks(), {}
    for annotation in _annotations(info.annotation):
        if isinstance(annotation, type) and issubclass(annotation, Settings) and not issubclass(annotation, Choice):
            return (annotation,), {}
    for axis in _axes_in(found):
        return (), choices_of(axis)
    return (), {}


def _at(loc: Sequence[int | str]) -> tuple[Blocks, dict[str, type[Choice]]]:
    """What may stand at a location, and where that is a choice, those of its axis."""
    blocks: Blocks = (Recipe,)
    kinds: dict[str, type[Choice]] = {}
    for part in loc:
        if isinstance(part, str) and part in kinds:
            blocks, kinds = (kinds[part],), {}
        elif isinstance(part, str) and part in _fields(blocks):
            blocks, kinds = _models_in(_fields(blocks)[part])
    return blocks, kinds


def _meant(loc: Sequence[int | str], key: str) -> str:
    """Which key was meant: what other trainers call so, the same word around or below this place, or the nearest here,
    or what is accepted here. The same word in a block that has nothing to do with this one is told as that."""
    valid, leaf = list(_fields(_at(loc[:-1])[0])), str(loc[-1])
    block = key.rsplit(".", 1)[0] + "." if "." in key else ""
    named = ELSEWHERE.get(key) or ELSEWHERE.get(leaf)
    if named is not None and leaf not in valid:
        return f" (did you mean {named!r}?)"
    elsewhere = sorted((k for k in all_keys() if k.rsplit(".", 1)[-1] == leaf), key=lambda k: k.count("."))
    related = [k for k in elsewhere if k.startswith(block) or block.startswith(k.removesuffix(leaf))]
    if related:
        shortest = [k for k in related if k.count(".") == related[0].count(".")]
        return f" (did you mean {' or '.join(repr(k) for k in shortest[:3])}?)"
    close = difflib.get_close_matches(leaf, valid, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {block + close[0]!r}?)"
    if elsewhere:
        others = [k for k in elsewhere if k.count(".") == elsewhere[0].count(".")]
        return f"; accepted here: {', '.join(valid)} (another block has {' and '.join(others[:3])})"
    far = difflib.get_close_matches(leaf, {k.rsplit(".", 1)[-1]: k for k in reversed(all_keys())}, n=1, cutoff=0.8)
    if far:
        return f" (did you mean {next(k for k in all_keys() if k.rsplit('.', 1)[-1] == far[0])!r}?)"
    return f"; accepted here: {', '.join(valid)}"


ELSEWHERE = {
    "lr": "update.learning_rate",
    "batch_size": "batch.prompts",
    "batch.size": "batch.prompts",
    "num_generations": "batch.group",
    "max_steps": "steps",
    "epochs": "steps",
}
"""Keys of recipes by what other trainers call them."""


@cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key that some recipe may use; choices within choices of the same axis are not looked into."""

    def keys(block: type[BaseModel], above: str, seen: frozenset[type[BaseModel]]) -> Iterator[str]:
        for name, info in block.model_fields.items():
            yield above + name
            blocks, kinds = _models_in(info)
            inner = dict.fromkeys([*blocks, *kinds.values()])
            for part in inner:
                if part not in seen:
                    yield from keys(part, f"{above}{name}.", seen | set(inner))

    return tuple(sorted(dict.fromkeys(keys(Recipe, "", frozenset())), key=lambda k: k.count(".")))


def _of_others(loc: Sequence[int | str]) -> list[str]:
    """Kinds of the students whose block has the key at `loc`, which this recipe's has not."""
    if len(loc) != 2 or loc[0] not in Recipe.model_fields or str(loc[1]) not in _fields(_at(loc[:1])[0]):
        return []
    key, policies = str(loc[1]), choices_of(Policy).items()
    return [k for k, each in policies if issubclass(each, Policy) and key in each.evaluation.model_fields]


def _place_key(loc: Sequence[int | str]) -> str | None:
    """The field that says where a choice of the axis at `loc` lies: a model, or a file of prompts."""
    axes = {choice.axis for choice in _at(loc)[1].values()}
    return "model" if axes & {Policy.axis, Teacher.axis} else "path" if Prompts.axis in axes else None


def _names_a_place(text: str) -> bool:
    return "/" in text or "." in text or text.startswith("package:") or Path(text).exists()
