"""How an axis finds its choices: every file of the axis's folder that defines a final subclass is a choice.

A new choice is a new file; no list of names is kept anywhere, so adding one edits no existing module. A package of
someone else's adds choices by an entry point of the group `opd.choices` that names its module, and a script by defining
a subclass: what exists when a recipe is read is accepted there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

from opd.errors import RecipeError, first_line
from opd.schedules import Scheduled

PACKAGES = "opd.choices"
"""Group of the entry points by which other packages name the modules that hold their choices."""


S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """A block of a recipe: unknown keys are errors, values are checked, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    names_things: ClassVar[bool] = True
    """Whether its texts are names, which are not empty; files that a run wrote may hold empty ones."""

    @field_validator("*", mode="before")
    @classmethod
    def _meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would take for something else, and what no part of a run can hold."""
        assert info.field_name is not None
        field = cls.model_fields[info.field_name]
        kinds = _kinds(field.annotation)  # type: ignore[arg-type]  # every annotation of a field is hashable
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, bool) and kinds & {int, float} and not kinds & {bool, Any, dict}:
                raise ValueError(f"{str(item).lower()} is no number")
            if isinstance(item, int) and abs(item) >= 2**63 and kinds & {int, float}:
                raise ValueError("larger than any number that a run can hold (64 bits)")
            if isinstance(item, str) and str in kinds and not kinds & {Any, dict}:
                if not item and field.default != "" and cls.names_things:
                    raise ValueError("an empty text names nothing; leave the key out for its default")
                if "\0" in item:
                    raise ValueError("a text with a zero byte names nothing")
        return value

    def scheduled(self, prefix: str = "") -> dict[str, Scheduled]:
        """What follows a schedule, by dotted key."""
        return {
            key: value for name in type(self).model_fields for key, value in _found(getattr(self, name), prefix + name)
        }

    def at(self, step: int, steps: int) -> Self:
        """These settings at one step (from 0) of a run of `steps`: numbers in the places of schedules."""
        names = {key.split(".", 1)[0] for key in self.scheduled()}
        return self.model_copy(update={n: _at(getattr(self, n), step, steps) for n in names}) if names else self


@cache
def _kinds(annotation: Any) -> frozenset[Any]:
    """The types that an annotation is made of."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return frozenset()
    own = get_origin(annotation) or annotation
    return frozenset([own]).union(*(_kinds(part) for part in inner if isinstance(part, Hashable)))


def _found(value: Any, key: str) -> list[tuple[str, Scheduled]]:
    if isinstance(value, Scheduled):
        return [(key, value)]
    if isinstance(value, Settings):
        return list(value.scheduled(f"{key}.").items())
    if isinstance(value, list | tuple):
        return [found for i, item in enumerate(value) for found in _found(item, f"{key}.{i}")]
    if isinstance(value, dict):
        return [found for name, item in value.items() for found in _found(item, f"{key}.{name}")]
    return []


def _at(value: Any, step: int, steps: int) -> Any:
    if isinstance(value, Scheduled):
        return value.at(step, steps)
    if isinstance(value, Settings):
        return value.at(step, steps)
    if isinstance(value, list | tuple):
        return [_at(item, step, steps) for item in value]
    if isinstance(value, dict):
        return {name: _at(item, step, steps) for name, item in value.items()}
    return value


class Choice(Settings):
    """Base of every axis. A subclass with a `kind` is one choice of that axis and is final."""

    axis: ClassVar[str] = ""
    modality: ClassVar[str | tuple[str, ...] | None] = None
    """What kind of student this is for, `language`, `flow` or `action`, or several of them; None fits any."""

    shown: ClassVar[tuple[str, ...]] = ()
    """Of what steps log (train/NAME), what a person follows while it trains: each has a place on the step's line where
    the step logged it."""

    @classmethod
    def shorthand(cls, value: object) -> dict[str, Any] | None:
        """The settings that something stands for which is no kind, at a place of this axis: of a model its name, of
        prompts their file; from Python an object. None where it stands for nothing."""
        return None

    @classmethod
    def fits(cls, modality: str | None) -> bool:
        """Whether it is for students of this modality."""
        own = cls.modality
        return own is None or modality in (own if isinstance(own, tuple) else (own,))


def names_a_place(text: str) -> bool:
    """Whether a text can be no kind but where something lies: a file, a folder, a name on the hub, or a package."""
    return "/" in text or "." in text or text.startswith("package:") or Path(text).exists()


def kind_of(choice: Choice | type[Choice]) -> str:
    """What recipes call a choice."""
    fields = (choice if isinstance(choice, type) else type(choice)).model_fields
    return str(fields["kind"].default)


def as_list(value: object) -> list[Any] | tuple[Any, ...]:
    """One item as a list of it, and none as an empty one, for fields that take one or several."""
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


def choices_of(axis: type[Choice]) -> dict[str, type[Choice]]:
    """The choices of an axis by `kind`, found by importing every module of the folder that the axis is defined in.

    An axis may be a part of another (every divergence is an objective): its folder is searched too. Choices of other
    packages are among them once those are loaded (`take_in`).

    Raises:
        RecipeError: two classes have one kind.
    """
    _import_folder(axis)
    for part in _descendants(axis):
        if "axis" in vars(part):
            _import_folder(part)
    found: dict[str, type[Choice]] = {}
    for each in _descendants(axis):
        if "kind" not in vars(each).get("__annotations__", {}):
            continue
        kind = kind_of(each)
        other = found.get(kind, each)
        # A cell of a notebook that is run again defines its class anew: the newest counts.
        if _place(other) != _place(each):
            raise RecipeError(
                f"{axis.axis} {kind!r} is defined in {_place(other)} and in {_place(each)}; rename one of the kinds"
            )
        found[kind] = each
    return dict(sorted(found.items()))


def take_in() -> None:
    """Make recipes accept every choice that exists by now: those of other packages, and classes that were defined
    after the recipe's types were made."""
    _load_packages()
    if all(tuple(choices_of(axis).values()) == accepted for axis, accepted in OneOf.accepted.items()):
        return
    blocks = [block for block in _descendants(Settings) if block.model_fields]
    # What a block holds of another's types is a copy, so all are forgotten before the first is made again.
    OneOf.accepted.clear()
    for block in blocks:
        for made in ("__pydantic_core_schema__", "__pydantic_validator__", "__pydantic_serializer__"):
            if made in vars(block):
                delattr(block, made)
        block.__pydantic_complete__ = False
    for block in blocks:
        if not block.__pydantic_complete__:
            block.model_rebuild(force=True)


@cache
def _load_packages() -> None:
    for entry in entry_points(group=PACKAGES):
        try:
            entry.load()
        except Exception as error:
            # Whatever another package raises when it is imported is its own matter; here it is one line.
            package = entry.dist.name if entry.dist is not None else entry.value
            raise RecipeError(
                f"package {package!r} offers choices in {entry.value} and that cannot be imported "
                f"({type(error).__name__}: {first_line(error)}); mend or uninstall it"
            ) from error


def _place(choice: type[Choice]) -> str:
    return f"{choice.__module__}.{choice.__qualname__}"


def nested(value: object) -> Iterator[Choice]:
    """Every choice in a value: itself, and those that its fields hold."""
    if isinstance(value, Choice):
        yield value
    parts: Iterable[Any] = ()
    if isinstance(value, Settings):
        parts = (getattr(value, name) for name in type(value).model_fields)
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    for part in parts:
        yield from nested(part)


def _import_folder(axis: type[Choice]) -> None:
    folder = importlib.import_module(axis.__module__.rsplit(".", 1)[0])
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")


def _descendants(cls: type[S]) -> list[type[S]]:
    return [d for sub in cls.__subclasses__() for d in (sub, *_descendants(sub))]


class OneOf:
    """Annotation for a recipe's field: `Annotated[Objective, OneOf(Objective)]`.

    Accepts an instance, a mapping with `kind`, the bare kind (`objective: reverse_kl`), or what the axis has a
    shorthand for (`teacher: org/large`). A kind is a kind, also where a folder of that name lies.
    """

    accepted: ClassVar[dict[type[Choice], tuple[type[Choice], ...]]] = {}
    """By axis, the choices that the types of recipes were made with."""

    def __init__(self, axis: type[Choice], default: str | None = None):
        self.axis, self.default = axis, default
        self.kinds: frozenset[str] = frozenset()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        members = choices_of(self.axis)
        self.kinds = frozenset(members)
        # A choice that holds others of its axis, and is defined later, knows more than the recipes that are there.
        self.accepted.setdefault(self.axis, tuple(members.values()))
        union = core_schema.tagged_union_schema(
            {kind: handler.generate_schema(member) for kind, member in members.items()},
            discriminator="kind",
        )
        return core_schema.no_info_before_validator_function(self._expand, union)

    def _expand(self, value: Any) -> Any:
        if not isinstance(value, dict | Choice):
            known = isinstance(value, str) and value in self.kinds
            meant = None if known else self.axis.shorthand(value)
            value = {"kind": value} if meant is None and isinstance(value, str) else value if meant is None else meant
        if isinstance(value, dict) and "kind" not in value and self.default:
            return {"kind": self.default, **value}
        return value
