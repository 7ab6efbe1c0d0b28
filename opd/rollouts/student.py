"""On-policy: the student extends the prompts itself, alone or by an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from opd.context import Context
from opd.language.rollout import LanguageRollout
from opd.rollouts.writing import StudentWrites

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class StudentRollout(StudentWrites):
    """Ancestral sampling at the run's temperature. `top_p` and `top_k` cut the distribution that is drawn from; then
    the states are no longer exactly the student's own, while the loss still compares whole distributions."""

    kind: Literal["student"] = "student"

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> LanguageRollout:
        return self.writer(context, student, teachers)
