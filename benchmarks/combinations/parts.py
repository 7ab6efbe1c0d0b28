"""One choice in a recipe, with what else its recipe needs; and the recipe of two of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

KEYS = {
    "curriculum": "curriculum",
    "rollout": "rollout",
    "engine": "rollout.engine",
    "watch": "rollout.watch",
    "teacher": "teacher",
    "shaping": "shaping",
    "compatibility": "shaping.signal",
    "objective": "objective",
    "update": "update",
}
"""The axes under test with their places in a recipe; what lies within another key comes behind it."""

LISTS = ("shaping", "objective")
"""Axes of which a recipe lists several choices: two of one of them are a pair too."""

WRITERS = {"mixture": "first", "switch": "then"}
"""Rollouts that are made of others, with the part of each in which the student writes."""


@dataclass(frozen=True)
class Part:
    """A choice under test.

    Attributes:
        axis: whose choice it is.
        name: its kind, with a word behind where several settings of one kind are told apart: `stored (sampled)`.
        value: its block of the recipe; of what lies in a rollout the keys there, None for none.
        needs: what its recipe has to say beside it, by key. An axis that is under test too keeps its own value, but
            that shapings are listed beside each other.
    """

    axis: str
    name: str
    value: Any = None
    needs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What recipes call it."""
        return self.name.split(" ")[0]


@dataclass(frozen=True)
class Task:
    """A tiny task of one kind of student.

    Attributes:
        name: of the kind of student, as recipes call it.
        base: the recipe in which choices are tried; it says all that is not under test.
        parts: the choices; the first of each axis is the one that `base` has.
        pairs: whether pairs are tried, or each choice by itself.
    """

    name: str
    base: Mapping[str, Any]
    parts: Sequence[Part]
    pairs: bool = True

    def of(self, axis: str) -> list[Part]:
        return [part for part in self.parts if part.axis == axis]

    def plain(self, axis: str) -> Part:
        """What stands in the place of a choice of this axis when it is asked what the choice changes."""
        return Part(axis, "none") if axis in ("watch", "engine") else self.of(axis)[0]

    def couples(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
        """Every pair of these parts that one recipe can hold."""
        for a, b in combinations(parts, 2):
            if a.axis == b.axis and (a.axis not in LISTS or a.kind == b.kind):
                continue
            # A signal of compatibility is tried in the shaping that takes one.
            if {a.axis, b.axis} != {"shaping", "compatibility"}:
                yield a, b

    def recipe(self, *parts: Part, instead: Part | None = None) -> dict[str, Any]:
        """The recipe of these parts, as plain data. With `instead`, that part stands in the place of the one of its
        axis, with all else as it was."""
        data = copy.deepcopy(dict(self.base))
        tested = {KEYS[part.axis].split(".")[0] for part in parts if part.axis not in ("engine", "watch")}
        beside: list[Any] = []
        for part in parts:
            for key, value in part.needs.items():
                if key not in tested:
                    data[key] = merged(data.get(key), value)
                elif key == "shaping":
                    beside.append(copy.deepcopy(value))
        values: dict[str, list[Any]] = {}
        for part in parts:
            shown = instead if instead is not None and instead.axis == part.axis else part
            values.setdefault(part.axis, []).append(copy.deepcopy(shown.value))
        for axis, key in KEYS.items():
            if axis in values:
                _place(data, key, values[axis])
        kinds = [each["kind"] for each in _listed(data["shaping"])]
        if missing := [each for each in beside if each["kind"] not in kinds]:
            data["shaping"] = [*_listed(data["shaping"]), *missing]
        return data


def merged(old: Any, new: Any) -> Any:
    """A block with other settings; another choice takes its place whole."""
    if isinstance(old, dict) and isinstance(new, dict) and new.get("kind", old.get("kind")) == old.get("kind"):
        return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}
    return copy.deepcopy(new)


def _place(data: dict[str, Any], key: str, values: list[Any]) -> None:
    if key == "shaping.signal":
        data["shaping"] = {"kind": "drift", "drop": 0.5, "base": 0.1, "signal": values[0]}
    elif "." in key:
        block = data["rollout"]
        block = block[WRITERS[block["kind"]]] if block["kind"] in WRITERS else block
        block |= values[0] or {}
    else:
        data[key] = values if len(values) > 1 else values[0]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]
