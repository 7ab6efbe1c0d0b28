"""Off-policy: a teacher extends the prompts, and the student learns on the teacher's states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from opd.context import Context
from opd.errors import IncompatibleError, nearest
from opd.language.rollout import LanguageRollout, SamplingSettings
from opd.rollouts.base import OneSource


class TeacherRollout(SamplingSettings, OneSource):
    """A live teacher samples at the run's temperature, under its own view of the prompt. Responses that were stored
    before are `rollout: data`."""

    kind: Literal["teacher"] = "teacher"
    teacher: str | None = Field(None, description="Name of the teacher that writes; default the first")

    def build(self, context: Context, student: Any, teachers: Sequence[Any]) -> LanguageRollout:
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
        if not hasattr(writer, "language"):
            raise IncompatibleError("rollout 'teacher' needs a teacher in this process: kind local or self")
        return LanguageRollout(
            writer.language, self, context, reader=student.language, author="teacher", sees=writer.settings.sees
        )
