"""On-policy: the student extends the prompts itself, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from opd.context import Context
from opd.language.engines.in_process import language_of
from opd.language.rollout import LanguageRollout, SamplingSettings
from opd.planning import Shape
from opd.rollouts.base import OneSource, Sampling

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class StudentRollout(SamplingSettings, OneSource):
    """Ancestral sampling at the run's temperature. `top_p` and `top_k` cut the distribution that is drawn from; then
    the states are no longer exactly the student's own, while the loss still compares whole distributions."""

    kind: Literal["student"] = "student"
    modality: ClassVar[str | None] = "language"

    def samplers(
        self, student: Shape, teachers: Sequence[tuple[str | None, Sequence[Shape]]]
    ) -> Iterator[tuple[Sampling, Shape]]:
        yield self, student

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> LanguageRollout:
        watch = None if self.watch is None else self.watch.build(context, student, teachers)
        return LanguageRollout(language_of(student, "the student"), self, context, watch=watch)
