"""What recipes can name: axes, their choices, and of one choice its settings; those of other packages among them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import packages_distributions
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from opd.choice import Choice, OneOf, Settings, choices_of, kind_of, take_in
from opd.errors import RecipeError, nearest
from opd.policies import Policy
from opd.policies.evaluation import Evaluation
from opd.recipe import Recipe
from opd.schedules import OverSteps

BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "at least", "max_length": "at most"}


@dataclass(frozen=True)
class Kind:
    """One choice of an axis: `package` is empty where it comes with opd, and `line` is what it does."""

    axis: str
    kind: str
    line: str
    package: str
    choice: type[Choice]


@dataclass(frozen=True)
class Setting:
    """One setting of a choice, as a person reads it; of a block within it the key is dotted."""

    key: str
    type: str
    default: str
    bounds: str
    description: str


def axes() -> dict[str, list[Kind]]:
    """The choices of every axis by its name: in the order of a recipe, then axes that lie within choices."""
    take_in()
    of_recipe = [axis for field in Recipe.model_fields.values() for axis in _axes(field)]
    return {
        axis.axis: [
            Kind(axis.axis, kind, first_sentence(choice), _package(choice), choice)
            for kind, choice in choices_of(axis).items()
        ]
        for axis in dict.fromkeys([*of_recipe, *OneOf.accepted])
    }


def blocks() -> dict[str, list[Setting]]:
    """Settings of a recipe's blocks that are no choice (`batch`, `hardware`, ...), and as `recipe` those that lie in no
    block."""
    found = {key: block for key, field in Recipe.model_fields.items() for block in _blocks(field.annotation)}
    of_blocks = {key: list(settings_of(block)) for key, block in found.items()}
    of_blocks["evaluation"] += _of_students()
    in_none = {key for key, field in Recipe.model_fields.items() if key not in found and not _axes(field)}
    return {"recipe": [each for each in settings_of(Recipe) if each.key in in_none], **of_blocks}


def _of_students() -> list[Setting]:
    """Settings of evaluation that some kinds of students add; each names them."""
    everywhere = {each.key for each in settings_of(Evaluation)}
    students: dict[type[Evaluation], list[str]] = {}
    for kind, policy in choices_of(Policy).items():
        if issubclass(policy, Policy):
            students.setdefault(policy.evaluation, []).append(kind)
    return [
        replace(each, description=f"{each.description} (student {', '.join(kinds)})")
        for block, kinds in students.items()
        for each in settings_of(block)
        if each.key not in everywhere
    ]


def find(name: str) -> list[Kind]:
    """The choices of `AXIS`, or the one of `AXIS.KIND`.

    Raises:
        RecipeError: there is no such axis or kind.
    """
    known = axes()
    axis, _, kind = name.partition(".")
    # A recipe's key may be called otherwise than the axis: a student is a policy.
    of_key = {key: each.axis for key, field in Recipe.model_fields.items() for each in _axes(field)[:1]}
    axis = axis if axis in known else of_key.get(axis, axis)
    if axis not in known:
        close = nearest(axis, [*known, *blocks()])
        raise RecipeError(
            f"no axis or block {axis!r}{close}; there are {', '.join(known)}, and the blocks {', '.join(blocks())}"
        )
    if not kind:
        return known[axis]
    found = [each for each in known[axis] if each.kind == kind]
    if not found:
        kinds = [each.kind for each in known[axis]]
        raise RecipeError(f"{axis} has no kind {kind!r}{nearest(kind, kinds)}; there are {', '.join(kinds)}")
    return found


def settings_of(choice: type[BaseModel], above: str = "") -> Iterator[Setting]:
    """What can be set of a choice or block."""
    for name, field in choice.model_fields.items():
        if name == "kind":
            continue
        yield Setting(above + name, _type(field), _default(field), _bounds(field), field.description or "")
        for block in _blocks(field.annotation):
            yield from settings_of(block, f"{above}{name}.")


def first_sentence(choice: type[Choice]) -> str:
    """Of its own docstring, on one line; empty where it has none."""
    text = " ".join(inspect.cleandoc(choice.__dict__.get("__doc__") or "").split("\n\n")[0].split())
    return re.split(r"(?<! al)\. ", text)[0].rstrip(".")


def _package(choice: type[Choice]) -> str:
    top = choice.__module__.split(".")[0]
    if top == "opd":
        return ""
    return next(iter(_distributions().get(top, [])), top)


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Installed packages by the modules that they bring; finding that out reads the files of all of them."""
    return packages_distributions()


def _blocks(annotation: Any) -> Iterator[type[Settings]]:
    """Settings blocks that a field holds one of; not choices, which have a place of their own."""
    if isinstance(annotation, type) and issubclass(annotation, Settings) and not issubclass(annotation, Choice):
        yield annotation
    elif get_origin(annotation) not in (list, tuple, dict):
        for part in get_args(annotation):
            yield from _blocks(part)


def _axes(field: FieldInfo) -> list[type[Choice]]:
    """The axis that a field takes a choice of, or a list of them."""

    def inside(annotation: Any) -> Iterator[type[Choice]]:
        yield from (item.axis for item in getattr(annotation, "__metadata__", ()) if isinstance(item, OneOf))
        for part in get_args(annotation):
            yield from inside(part)

    return [*(item.axis for item in field.metadata if isinstance(item, OneOf)), *inside(field.annotation)]


def _type(field: FieldInfo) -> str:
    own = [item.axis.axis for item in field.metadata if isinstance(item, OneOf)]
    text = own[0] if own else _named(field.annotation)
    return f"{text} or a schedule" if any(isinstance(item, OverSteps) for item in _metadata(field)) else text


def _named(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if hasattr(annotation, "__metadata__"):
        axes = [item.axis.axis for item in annotation.__metadata__ if isinstance(item, OneOf)]
        return axes[0] if axes else _named(arguments[0])
    if origin is Literal:
        return " | ".join("null" if value is None else str(value) for value in arguments)
    if origin in (list, tuple, dict):
        inside = [_named(part) for part in arguments if part is not Ellipsis]
        return f"{origin.__name__} of {', '.join(inside)}" if inside else str(origin.__name__)
    if arguments:
        return " | ".join(_named(part) for part in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Settings) and not issubclass(annotation, Choice):
        return "a block"
    return "text" if annotation is str else getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Choice):
        return kind_of(value)
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value) if value != "" else "''"


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Of the field, and of a type that is one of several: `Annotated[float, OverSteps(gt=0)] | None`."""
    yield from field.metadata
    if get_origin(field.annotation) in (Union, UnionType):
        yield from (item for part in get_args(field.annotation) for item in getattr(part, "__metadata__", ()))


def _bounds(field: FieldInfo) -> str:
    found: dict[str, Any] = {}
    for item in _metadata(field):
        of_item = item.bounds if isinstance(item, OverSteps) else {n: getattr(item, n, None) for n in BOUNDS}
        found |= {name: value for name, value in of_item.items() if value is not None}
    return ", ".join(f"{BOUNDS[name]} {value}" for name, value in found.items() if name in BOUNDS)
