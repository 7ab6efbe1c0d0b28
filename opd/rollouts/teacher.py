"""Off-policy: a teacher extends the prompts, and the student learns on the teacher's states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.errors import IncompatibleError, nearest
from opd.language.rollout import LanguageRollout, SamplingSettings
from opd.planning import Shape
from opd.prompts import Prompt
from opd.rollouts.base import OneSource, PrefixSource, Rollout, Sampling, divided
from opd.teachers import LiveTeacher
from opd.trajectories import Trajectories


class TeacherRollout(SamplingSettings, OneSource):
    """A live teacher samples at the run's temperature, under its own view of the prompt; of a routed one each prompt's
    own. Responses that were stored before are `rollout: data`."""

    kind: Literal["teacher"] = "teacher"
    modality: ClassVar[str | None] = "language"
    teacher: str | None = Field(None, description="Name of the teacher that writes; default the first")

    def samplers(
        self, student: Shape, teachers: Sequence[tuple[str | None, Sequence[Shape]]]
    ) -> Iterator[tuple[Sampling, Shape]]:
        named = [shapes for name, shapes in teachers if shapes and name == self.teacher and name is not None]
        for shape in next(iter(named or [shapes for _, shapes in teachers if shapes]), ()):
            yield self, shape

    def build(self, context: Context, student: Any, teachers: Sequence[Any]) -> PrefixSource:
        names = [t.settings.name for t in teachers]
        if self.teacher is not None and self.teacher not in names:
            known = [n for n in names if n]
            raise IncompatibleError(
                f"rollout.teacher is {self.teacher!r}{nearest(self.teacher, known)}; the recipe names "
                f"{known or 'none'}: give that teacher a name"
            )
        if not teachers:
            raise IncompatibleError("rollout 'teacher' needs a teacher, and the recipe has none; add the key teacher")
        writer = teachers[names.index(self.teacher) if self.teacher is not None else 0]
        members = writer.members()
        if not all(hasattr(member, "language") for member in members.values()):
            raise IncompatibleError("rollout 'teacher' needs a teacher in this process: kind local or self")
        sources = {
            route: LanguageRollout(
                member.language, self, context, reader=student.language, author="teacher", sees=member.settings.sees
            )
            for route, member in members.items()
        }
        return RoutedWriters(self, context, writer, sources) if writer is not members.get("") else sources[""]


class RoutedWriters(PrefixSource):
    """The built rollout of a routed teacher."""

    authors = frozenset({"teacher"})
    exact = False

    def __init__(self, settings: Rollout, context: Context, teacher: LiveTeacher, sources: Mapping[str, PrefixSource]):
        self.settings, self.context, self.teacher, self.sources = settings, context, teacher, sources

    def writers(self) -> list[PrefixSource]:
        return list(self.sources.values())

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        budget: int,
        stream: int,
        begun: Sequence[torch.Tensor] | None = None,
    ) -> Trajectories:
        routes = [self.teacher.route(prompt) for prompt in prompts]
        shares = []
        for name, source in self.sources.items():
            source.settings, source.context = self.settings, self.context
            shares.append((source, [i for i, route in enumerate(routes) if route == name]))
        return divided(shares, prompts, group, budget, stream, begun)
