"""Several teachers of whom exactly one answers for a prompt: the one that a column of the prompt names."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from opd.choice import OneOf
from opd.context import Context
from opd.distributions import Distribution, Target, joined, joined_targets
from opd.errors import DataError, IncompatibleError, nearest
from opd.language.engines.base import Scorer
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.teachers.base import LiveTeacher, Teacher, answers_of
from opd.trajectories import Trajectories


class RoutedTeacher(Teacher):
    """Hard routing, teacher `k(c)` of each prompt `c` (Flow-OPD's multi-teacher stage, Uni-OPD): every trajectory is
    answered by its own teacher and by no other.

    A route's `weight` counts at its own positions, times this teacher's.
    """

    kind: Literal["routed"] = "routed"
    by: str = Field(description="Column of the prompts that names the route")
    routes: dict[str, Annotated[Teacher, OneOf(Teacher, "local")]] = Field(
        min_length=1, description="Teachers by the column's value; they may differ in size"
    )
    default: str | None = Field(None, description="Route of the prompts whose value has none; without it, an error")

    @model_validator(mode="after")
    def _fits(self) -> RoutedTeacher:
        for tag, route in self.routes.items():
            if not tag or "." in tag:
                raise ValueError(f"route {tag!r}: a tag is not empty and has no dot, which separates keys; rename it")
            if isinstance(route, RoutedTeacher):
                raise ValueError(f"route {tag!r} is routed itself; list its routes here")
            if route.debate.experts:
                raise ValueError(f"route {tag!r} is a debate; make the debate the teacher, its experts may be routed")
            if route.name is not None:
                raise ValueError(f"route {tag!r} has a name, {route.name!r}; its tag is its name, remove it")
        if self.default is not None and self.default not in self.routes:
            raise ValueError(
                f"default is {self.default!r}{nearest(self.default, self.routes)}; routes: {', '.join(self.routes)}"
            )
        if self.sees is not None or self.batch != Teacher.model_fields["batch"].default:
            raise ValueError("'sees' and 'batch' are settings of each route; move them there")
        return self

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [each for route in self.routes.values() for each in route.answered(student)]

    @property
    def listed(self) -> int | None:
        return min((k for route in self.routes.values() if (k := route.listed) is not None), default=None)

    def check_scorer(self, home: torch.device) -> None:
        for route in self.routes.values():
            route.check_scorer(home)

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        return [
            replace(shape, name=f"{shape.name} for {tag}")
            for tag, route in self.routes.items()
            for shape in route.shapes(student, notes)
        ]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self.route(prompt)

    def route(self, prompt: Prompt) -> str:
        """The tag of the route that answers for a prompt; raises `DataError` where there is none."""
        by, default = self.by, self.default
        if by not in prompt.fields:
            raise DataError(
                f"{prompt.where}: prompt {prompt.id!r} has no column {by!r}{nearest(by, prompt.columns)}, by which "
                f"teacher.by chooses a route; it has {prompt.columns}"
            )
        value = prompt.fields[by]
        tag = str(value)
        if tag not in self.routes and default is None:
            raise DataError(
                f"{prompt.where}: prompt {prompt.id!r} has {by} {value!r}{nearest(tag, self.routes)}, and "
                f"teacher.routes has {', '.join(self.routes)}; add a route, or name one for all others in "
                "teacher.default"
            )
        return tag if tag in self.routes else str(default)

    def build(self, context: Context, student: Student) -> RoutedTeachers:
        return RoutedTeachers(self, {tag: r.build(context, student) for tag, r in self.routes.items()})


class RoutedScorer(Scorer):
    """Growing completions, each scored by its own route.

    Args:
        parts: rows and their scorer, which counts them from 0.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Scorer]]):
        self.scorers = [scorer for _, scorer in parts]
        self.place = {row: (k, i) for k, (rows, _) in enumerate(parts) for i, row in enumerate(rows)}

    def extend(self, tokens: Mapping[int, torch.Tensor]) -> Distribution:
        shares: dict[int, dict[int, torch.Tensor]] = {}
        positions: dict[int, list[torch.Tensor]] = {}
        start = 0
        for row, new in tokens.items():
            k, i = self.place[row]
            shares.setdefault(k, {})[i] = new
            positions.setdefault(k, []).append(torch.arange(start, start + len(new)))
            start += len(new)
        parts = [self.scorers[k].extend(share) for k, share in shares.items()]
        return joined(parts, [torch.cat(positions[k]) for k in shares])

    def drop(self, rows: Sequence[int]) -> None:
        for row in rows:
            k, i = self.place[row]
            self.scorers[k].drop([i])


class RoutedTeachers(LiveTeacher[RoutedTeacher]):
    """The built routes.

    Raises:
        IncompatibleError: routes that answer different kinds of distribution.
    """

    def __init__(self, settings: RoutedTeacher, routes: Mapping[str, LiveTeacher]):
        self.settings, self.routes = settings, dict(routes)
        kinds = {tag: route.answers.kind for tag, route in self.routes.items()}
        if len(set(kinds.values())) > 1:
            told = ", ".join(f"{tag} {kind}" for tag, kind in kinds.items())
            raise IncompatibleError(
                f"the routes of a teacher must answer alike, and these do not: {told}; score stored ones anew, and "
                "where a route has a tokenizer of its own set tokenizer: own on all"
            )
        self.answers = next(iter(self.routes.values())).answers
        self.everywhere = all(route.everywhere for route in self.routes.values())
        self.remembers = any(route.remembers for route in self.routes.values())

    @property
    def notes(self) -> list[str]:
        return [note for route in self.routes.values() for note in route.notes]

    def members(self) -> dict[str, LiveTeacher]:
        return self.routes

    def route(self, prompt: Prompt) -> str:
        return self.settings.route(prompt)

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: RoutedTeacher, context: Context) -> list[Target]:
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(trajectories.prompts):
            rows.setdefault(self.route(prompt), []).append(i)
        parts, positions, scored = {}, [], 0.0
        for tag, mine in rows.items():
            part, here = trajectories.pick(mine)
            parts[tag] = answers_of(self.routes[tag], part, settings.routes[tag], context)
            positions.append(here.to(context.device))
            scored += self.routes[tag].asked * part.positions
        self.asked = scored / max(1, trajectories.positions)
        counts = {tag: len(said) for tag, said in parts.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{tag} {count}" for tag, count in counts.items())
            raise IncompatibleError(
                f"the routes of a teacher must give equally many answers, and these do not: {told}; make them teachers "
                "of their own"
            )
        each = [joined_targets(said, positions) for said in zip(*parts.values(), strict=True)]
        return [replace(target, teacher=settings.name) for target in each]

    @property
    def early(self) -> bool:  # type: ignore[override]
        return any(member.early for member in self.members().values())

    def expect(self, prompt: Prompt, actions: torch.Tensor) -> None:
        self.members()[self.route(prompt)].expect(prompt, actions)

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        return {
            f"{name}@{tag}": value
            for tag, route in self.routes.items()
            for name, value in route.own_signals(sum_over_processes).items()
        }

    def failures(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for route in self.routes.values():
            counts.update(route.failures())
        return dict(counts)

    def check_scorer(self, context: Context) -> None:
        for route in self.routes.values():
            route.check_scorer(context)

    def scorer(self, prompts: Sequence[Prompt], begun: Sequence[torch.Tensor], context: Context) -> Scorer:
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            rows.setdefault(self.route(prompt), []).append(i)
        return RoutedScorer(
            [
                (mine, self.routes[tag].scorer([prompts[i] for i in mine], [begun[i] for i in mine], context))
                for tag, mine in rows.items()
            ]
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self.routes[self.route(prompt)].check_prompts([prompt])

    def check_lengths(self, prompts: Sequence[Prompt], budget: int, which: str) -> list[str]:
        return [
            warning
            for tag, route in self.routes.items()
            for warning in route.check_lengths(
                [p for p in prompts if self.route(p) == tag], budget, f"{which} of route {tag!r}"
            )
        ]

    def prompt_length(self, prompt: Prompt) -> int | None:
        return self.routes[self.route(prompt)].prompt_length(prompt)

    def check_student(self, student: Student, context: Context) -> None:
        for route in self.routes.values():
            route.check_student(student, context)

    def check_origin(self, student: Student) -> None:
        for route in self.routes.values():
            route.check_origin(student)

    def follow(self, student: Student) -> None:
        for route in self.routes.values():
            route.follow(student)

    def fingerprint(self) -> str:
        told = "".join(f"{tag} {route.fingerprint()}\n" for tag, route in self.routes.items())
        return hashlib.sha256(told.encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Of the routes that move."""
        return {tag: route.state_dict() for tag, route in self.routes.items() if hasattr(route, "state_dict")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for tag, route in self.routes.items():
            if hasattr(route, "load_state_dict"):
                route.load_state_dict(state[tag])
