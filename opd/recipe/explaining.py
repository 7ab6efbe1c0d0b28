"""What is wrong with a recipe, said to a person: key, value, what is accepted, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from datetime import date
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from opd.choice import Choice, OneOf, Settings, choices_of
from opd.errors import nearest
from opd.files.recipes import short
from opd.policies import Policy
from opd.prompts import Prompts
from opd.prompts.base import FILES
from opd.recipe.tree import OfStudent, Recipe
from opd.teachers import Teacher


def explain(error: ValidationError, data: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> str:
    """The first mistake in at most two lines: key, value, what is accepted, the fix; and how many more there are.

    Args:
        origin: where `data` comes from, for all that none of the `overrides` (`key=value`) says.
    """
    first = error.errors()[0]
    loc, kind = first["loc"], first["type"]
    key = _dotted(loc, data)
    origin = _said_by(overrides, key) or origin
    more = error.error_count() - 1
    tail = f" ({more} more mistake{'s' if more > 1 else ''} in this recipe)" if more else ""
    if kind in ("extra_forbidden", "missing") and (meant := _kind_meant(loc, data)):
        block, own, kinds = meant
        return f"{origin}: {block} has {own!r}, which is for kind {kinds}, and names no kind; write kind: {kinds}{tail}"
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
        close, place = nearest(str(tag), expected), _place(loc)
        other = f", or {place}" if place else ""
        return f"{origin}: {key}.kind is {tag!r}{close}; accepted: {', '.join(expected)}{other}{tail}"
    if kind == "union_tag_not_found":
        return f"{origin}: {key} is {value}; it needs a 'kind', one of {', '.join(_at(loc)[1])}{tail}"
    if kind in WANTED:
        given = first.get("input")
        quote = "date" if isinstance(given, date) else "number" if isinstance(given, int | float) else None
        aside = f"; quote what YAML takes for a {quote}" if quote and kind == "string_type" else ""
        return f"{origin}: {key} is {value}: it takes {_wanted(loc, kind)}{aside}{_default(loc, given)}{tail}"
    if kind == "literal_error":
        expected = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
        return f"{origin}: {key} is {value}: accepted: {expected}{_default(loc, first.get('input'))}{tail}"
    if kind == "too_short" and isinstance(first.get("input"), list) and not first["input"]:
        return f"{origin}: {key} is []: it needs {first['ctx']['min_length']} item or more{_default(loc, None)}{tail}"
    message = first["msg"].removeprefix("Value error, ")
    if kind == "value_error" and loc and isinstance(first.get("input"), dict):
        # A rule about several of a block's keys names them itself.
        return f"{origin}: {key}: {message}{tail}"
    if not loc:
        return f"{origin}: {message}{tail}"
    return f"{origin}: {key} is {value}: {message[:1].lower() + message[1:]}{tail}"


def _said_by(overrides: Sequence[str], key: str) -> str | None:
    """The last override that set a key, something in it, or what it stands in."""

    def plain(dotted: str) -> list[str]:
        return [part for part in dotted.split(".") if not part.isdecimal()]

    for override in reversed(overrides):
        ours, theirs = plain(key), plain(override.partition("=")[0])
        if all(a == b for a, b in zip(ours, theirs, strict=False)):
            return f"override {short(override)}"
    return None


WANTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a block of keys, {key: value, ...}"),
    "string_type": "a text",
    "list_type": "a list, [item, ...]",
}
"""What a place takes, by pydantic's names of finding another type there."""


def _wanted(loc: Sequence[int | str], kind: str) -> str:
    blocks, kinds = _at(loc)
    if kinds and kind == "model_attributes_type":
        return f"a kind, or a block {{kind: ..., ...}}; kinds: {', '.join(kinds)}"
    keys = list(_fields(blocks)) if kind.startswith("model") else []
    return f"{WANTED[kind]} with keys such as {', '.join(keys[:4])}" if keys else WANTED[kind]


def _default(loc: Sequence[int | str], value: object) -> str:
    """What to do instead of writing null at a place that has a default."""
    field = _fields(_at(loc[:-1])[0]).get(str(loc[-1])) if loc else None
    return "; leave the key out for its default" if value is None and field and not field.is_required() else ""


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


def _of_one_kind(key: str) -> bool:
    """Whether a key is a setting of a single kind of its place, so that few can have meant it."""
    *place, leaf = key.split(".")
    kinds = _at(place)[1].values()
    return sum(leaf in kind.model_fields for kind in kinds) == 1


def _meant(loc: Sequence[int | str], key: str) -> str:
    """Which key was meant: what other trainers call so, the same word around or below this place, or the nearest here,
    or what is accepted here. A setting of another kind of this place, and the same word in a block that has nothing to
    do with this one, are told as that."""
    valid, leaf = list(_fields(_at(loc[:-1])[0])), str(loc[-1])
    block = key.rsplit(".", 1)[0] + "." if "." in key else ""
    named = ELSEWHERE.get(key) or ELSEWHERE.get(leaf)
    if named is not None and leaf not in valid:
        return f" (did you mean {named!r}?)"
    if having := _kinds_with(loc):
        accepted = [name for name in valid if name != "kind"] or ["no settings"]
        return (
            f"; {leaf} is a setting of kind {', '.join(having[:4])}{', ...' if having[4:] else ''}, and this is kind "
            f"{loc[-2]}, which takes {', '.join(accepted)}"
        )
    elsewhere = sorted((k for k in all_keys() if k.rsplit(".", 1)[-1] == leaf), key=lambda k: k.count("."))
    related = [k for k in elsewhere if k.startswith(block) or block.startswith(k.removesuffix(leaf))]
    if related:
        shortest = [k for k in related if k.count(".") == related[0].count(".")]
        shortest = [k for k in shortest if not _of_one_kind(k)] or shortest
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


def _kinds_with(loc: Sequence[int | str]) -> list[str]:
    """The other kinds of the choice at whose key `loc` points that have this key."""
    kinds = _at(loc[:-2])[1]
    if len(loc) < 2 or loc[-2] not in kinds:
        return []
    return [kind for kind, each in kinds.items() if loc[-1] in each.model_fields]


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


def _kind_meant(loc: Sequence[int | str], data: Any) -> tuple[str, str, str] | None:
    """Of a choice that is written without its kind, and whose keys are those of other kinds than the default: where it
    stands, a key that tells, and the kinds that have all of its keys."""
    kinds = _at(loc[:-2])[1]
    if len(loc) < 2 or loc[-2] not in kinds:
        return None
    block = data
    for part in loc[:-2]:
        if part in block if isinstance(block, dict) else isinstance(block, list) and isinstance(part, int):
            block = block[part]
    if not isinstance(block, dict) or "kind" in block:
        return None
    foreign = [key for key in block if key not in kinds[str(loc[-2])].model_fields]
    fitting = [kind for kind, each in kinds.items() if set(block) <= set(each.model_fields)]
    if not foreign or not fitting:
        return None
    return _dotted(loc[:-1], data), foreign[0], " or ".join(fitting)


def _of_others(loc: Sequence[int | str]) -> list[str]:
    """Kinds of the students whose block has the key at `loc`, which this recipe's has not."""
    if len(loc) != 2 or loc[0] not in Recipe.model_fields or str(loc[1]) not in _fields(_at(loc[:1])[0]):
        return []
    key, policies = str(loc[1]), choices_of(Policy).items()
    return [k for k, each in policies if issubclass(each, Policy) and key in each.evaluation.model_fields]


def _place(loc: Sequence[int | str]) -> str | None:
    """What may stand at `loc` besides kinds, where that is a place: a model, or prompts."""
    axes = {choice.axis for choice in _at(loc)[1].values()}
    if axes & {Policy.axis, Teacher.axis}:
        return "a model: a folder, or a hub name ORG/NAME"
    return f"a file ({', '.join(FILES)}), a folder, or a data set ORG/NAME" if Prompts.axis in axes else None


def spelt_out(loc: Sequence[str], text: str) -> dict[str, Any]:
    """The block that a text at `loc` of a recipe stands for, so that keys can be set in it: a kind, or what its axis
    has a shorthand for."""
    kinds = _at(loc)[1]
    axis = next(iter(kinds.values()), None)
    meant = None if text in kinds or axis is None else axis.shorthand(text)
    return {"kind": text} if meant is None else meant
