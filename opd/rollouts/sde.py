"""On-policy for flow models: the student denoises by its own SDE; or a teacher does, for the off-policy control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from opd.context import Context
from opd.errors import IncompatibleError, nearest
from opd.flow.model import flow_model_of
from opd.flow.rollout import FlowRollout, SamplerSettings
from opd.rollouts.base import PrefixSource, Rollout
from opd.rollouts.teacher import RoutedWriters

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class SDERollout(SamplerSettings, Rollout):
    """`steps` steps of the stochastic sampler from noise to an image; the student learns on the latents of the first of
    them, and a verifier reads the image. Of a routed teacher each prompt's own denoises."""

    kind: Literal["sde"] = "sde"
    modality: ClassVar[str | None] = "flow"
    teacher: str | None = Field(None, description="Name of the teacher that denoises; default the student")

    @property
    def budget(self) -> int:
        return self.trained_steps

    @property
    def sampled(self) -> int:
        return self.steps

    def check_teacher(self, names: Sequence[str | None]) -> None:
        """Refuse a `teacher` that is none of the recipe's."""
        known = [n for n in names if n]
        if self.teacher is not None and self.teacher not in known:
            raise IncompatibleError(
                f"rollout.teacher is {self.teacher!r}{nearest(self.teacher, known)}; the recipe names "
                f"{known or 'none'}: give that teacher a name"
            )

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> PrefixSource:
        reader = flow_model_of(student, "the student")
        if self.teacher is None:
            return FlowRollout(reader, self)
        names = [t.settings.name for t in teachers]
        self.check_teacher(names)
        writer = teachers[names.index(self.teacher)]
        members = writer.members()
        sources = {
            route: FlowRollout(
                flow_model_of(member, "the teacher that denoises"), self, reader=reader, author="teacher"
            )
            for route, member in members.items()
        }
        return RoutedWriters(writer, sources) if writer is not members.get("") else sources[""]
