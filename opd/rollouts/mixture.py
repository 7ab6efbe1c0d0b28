"""Some trajectories from one source and some from another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from opd.choice import OneOf
from opd.context import Context
from opd.rollouts.base import Combination, PrefixSource, Rollout, SeveralSources, divided
from opd.rollouts.request import Request
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout
from opd.schedules import OverSteps
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class MixtureRollout(SeveralSources):
    """Each prompt (or the whole batch) goes to `first` with probability `share`, else to `second`; a schedule of
    `share` from 0 to 1 moves from the teacher's states to the student's."""

    kind: Literal["mixture"] = "mixture"
    first: Annotated[Rollout, OneOf(Rollout)] = Field(
        StudentRollout(), description="Writes `share` of the trajectories"
    )
    second: Annotated[Rollout, OneOf(Rollout)] = Field(TeacherRollout(), description="Writes the others")
    share: Annotated[float, OverSteps(ge=0, le=1)] = Field(0.5, description="Probability of the first source")
    by: Literal["prompt", "batch"] = Field("prompt", description="Whether each prompt or each batch draws its source")

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> Mixed:
        return Mixed([part.build(context, student, teachers) for part in self.parts])


class Mixed(Combination[MixtureRollout]):
    """The built mixture."""

    def __call__(self, request: Request[MixtureRollout]) -> Trajectories:
        return divided(self._shares(request), request)

    def drawn(self, request: Request[MixtureRollout]) -> None:
        for source, settings, mine in self._shares(request):
            source.drawn(request.to(settings, mine))

    def _shares(self, request: Request[MixtureRollout]) -> list[tuple[PrefixSource, Rollout, list[int]]]:
        """Each source with the indices of the prompts that it extends; the same whoever else is in the list."""
        settings = request.settings
        names = [p.id if settings.by == "prompt" else "" for p in request.prompts]
        draws = [random.Random(f"{request.context.seed}/{request.stream}/{name}").random() for name in names]
        return [
            (source, part, [i for i, draw in enumerate(draws) if (draw < settings.share) == wanted])
            for source, part, wanted in zip(self.sources, settings.parts, (True, False), strict=True)
        ]
