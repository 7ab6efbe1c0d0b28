"""Off-policy: a teacher extends the prompts, and the student learns on the teacher's states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from opd.context import Context
from opd.errors import IncompatibleError, nearest
from opd.language.engines.in_process import language_of
from opd.language.rollout import LanguageRollout, SamplingSettings
from opd.planning import Shape
from opd.rollouts.base import HeldOutSampler, OneSource, PrefixSource, Rollout, Sampling, divided
from opd.rollouts.request import Request
from opd.teachers import LiveTeacher
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.policies import Student


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

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> PrefixSource:
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
        if writer.member_role != "route":
            raise IncompatibleError(
                "rollout 'teacher': several experts answer together there, and one model writes a completion; list the "
                "one that writes as a teacher of its own, with a name, and name it in rollout.teacher"
            )
        if any(member.translates for member in members.values()):
            raise IncompatibleError(
                "rollout 'teacher': the teacher that writes has tokenizer: own, and what it writes are ids of that "
                "tokenizer, not the student's; let a teacher of the student's tokenizer write, or take rollout: data "
                "with texts that were written before"
            )
        if not all(hasattr(member, "language") for member in members.values()):
            raise IncompatibleError("rollout 'teacher' needs a teacher in this process: kind local or self")
        reader = language_of(student, "the student")
        watch = None if self.watch is None else self.watch.build(context, student, teachers)
        sources = {
            route: LanguageRollout(
                language_of(member, "the teacher that writes"),
                self,
                context,
                reader=reader,
                author="teacher",
                view=member.settings.view,
                watch=watch,
            )
            for route, member in members.items()
        }
        return RoutedWriters(writer, sources) if writer is not members.get("") else sources[""]


class RoutedWriters(PrefixSource[Rollout]):
    """The built rollout of a routed teacher."""

    authors = frozenset({"teacher"})

    def __init__(self, teacher: LiveTeacher, sources: Mapping[str, PrefixSource]):
        self.teacher, self.sources = teacher, sources

    def writers(self) -> list[PrefixSource]:
        return list(self.sources.values())

    def exact(self, settings: Rollout) -> bool:
        return False

    def held_out(self, settings: Rollout, context: Context, student: Student) -> HeldOutSampler:
        return next(iter(self.sources.values())).held_out(settings, context, student)

    def __call__(self, request: Request[Rollout]) -> Trajectories:
        routes = [self.teacher.route(prompt) for prompt in request.prompts]
        shares = [
            (source, request.settings, [i for i, route in enumerate(routes) if route == name])
            for name, source in self.sources.items()
        ]
        return divided(shares, request)
