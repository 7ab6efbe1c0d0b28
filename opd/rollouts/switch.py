"""One trajectory from two sources: the second goes on where the first stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.choice import OneOf
from opd.context import Context
from opd.errors import IncompatibleError
from opd.prompts import Prompt
from opd.rollouts.base import Combination, Rollout, SeveralSources
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout
from opd.schedules import OverSteps
from opd.trajectories import Trajectories, continued


class SwitchRollout(SeveralSources):
    """`first` writes up to `position` actions, `then` goes on to the budget. With a schedule of `position` the student
    takes over earlier and earlier."""

    kind: Literal["switch"] = "switch"
    modality: ClassVar[str | None] = "language"
    first: Annotated[Rollout, OneOf(Rollout)] = Field(TeacherRollout(), description="Writes the first tokens")
    then: Annotated[Rollout, OneOf(Rollout)] = Field(StudentRollout(), description="Goes on from there")
    position: Annotated[int, OverSteps(ge=0)] = Field(16, description="Actions that the first source writes")

    def build(self, context: Context, student: Any, teachers: Sequence[Any]) -> Switched:
        sources = [part.build(context, student, teachers) for part in self.parts]
        if "data" in sources[1].authors:
            raise IncompatibleError("rollout.then is 'data'; a stored response cannot go on what another source began")
        return Switched(self, context, sources)


class Switched(Combination):
    """The built switch."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        budget: int,
        stream: int,
        begun: Sequence[torch.Tensor] | None = None,
    ) -> Trajectories:
        begin, go_on = self.sources
        at = min(self.settings.position, budget)
        if at == 0:
            return go_on(prompts, group, budget, stream, begun)
        first = begin(prompts, group, at, stream, begun)
        # What ended by itself or was stopped stays as it is; the rest goes on, each from its own beginning.
        stopped = first.stopped or [None] * len(first)
        going = [i for i, ended in enumerate(first.finished.tolist()) if not ended and stopped[i] is None]
        if not going or at == budget:
            return first
        own = first.completions()
        starts = [own[i] if begun is None else torch.cat([begun[i].to(own[i].device), own[i]]) for i in going]
        rest = go_on([first.prompts[i] for i in going], 1, budget - at, stream, starts)
        return continued(first, going, rest)

    def drawn(self, prompts: Sequence[Prompt], stream: int) -> None:
        # What goes on is no stored trajectory, so only the one that begins takes turns.
        begin, go_on = self.sources
        (begin if self.settings.position else go_on).drawn(prompts, stream)
