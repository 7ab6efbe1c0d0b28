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
from opd.rollouts.base import PrefixSource, Rollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout
from opd.schedules import OverSteps
from opd.trajectories import Trajectories, continued


class SwitchRollout(Rollout):
    """`first` writes up to `position` actions, `then` goes on to the budget. With a schedule of `position` the student
    takes over earlier and earlier."""

    kind: Literal["switch"] = "switch"
    modality: ClassVar[str | None] = "language"
    first: Annotated[Rollout, OneOf(Rollout)] = TeacherRollout()
    then: Annotated[Rollout, OneOf(Rollout)] = StudentRollout()
    position: Annotated[int, OverSteps(ge=0)] = Field(16, description="Actions that the first source writes")

    @property
    def budget(self) -> int:
        return max(self.first.budget, self.then.budget)

    def build(self, context: Context, student: Any, teachers: Sequence[Any]) -> Switched:
        sources = self.first.build(context, student, teachers), self.then.build(context, student, teachers)
        if "data" in sources[1].authors:
            raise IncompatibleError("rollout.then is 'data'; a stored response cannot go on what another source began")
        return Switched(self, context, *sources)


class Switched(PrefixSource):
    """The built switch."""

    exact = False

    def __init__(self, settings: SwitchRollout, context: Context, first: PrefixSource, then: PrefixSource):
        self.settings, self.context, self.first, self.then = settings, context, first, then
        self.authors = first.authors | then.authors
        self.current = first.current and then.current

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        self.first.check_prompts(prompts)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        budget: int,
        stream: int,
        begun: Sequence[torch.Tensor] | None = None,
    ) -> Trajectories:
        self.first.settings, self.then.settings = self.settings.first, self.settings.then
        at = min(self.settings.position, budget)
        if at == 0:
            return self.then(prompts, group, budget, stream, begun)
        first = self.first(prompts, group, at, stream, begun)
        # What ended by itself stays as it is; the rest goes on, each from its own beginning.
        going = [i for i, ended in enumerate(first.finished.tolist()) if not ended]
        if not going or at == budget:
            return first
        own = first.completions()
        starts = [own[i] if begun is None else torch.cat([begun[i].to(own[i].device), own[i]]) for i in going]
        rest = self.then([first.prompts[i] for i in going], 1, budget - at, stream, starts)
        return continued(first, going, rest)
