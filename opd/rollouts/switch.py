"""One trajectory from two sources: the second goes on where the first stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from opd.choice import OneOf
from opd.context import Context
from opd.errors import IncompatibleError
from opd.rollouts.base import Combination, Rollout, SeveralSources
from opd.rollouts.request import Request
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout
from opd.schedules import OverSteps, extremes
from opd.trajectories import Trajectories, continued

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class SwitchRollout(SeveralSources):
    """`first` writes up to `position` actions, `then` goes on. With a schedule of `position` the student takes over
    earlier and earlier.

    Each source writes at most its own `max_new_tokens`, and a trajectory is no longer than the larger of both."""

    kind: Literal["switch"] = "switch"
    modality: ClassVar[str | None] = "language"
    first: Annotated[Rollout, OneOf(Rollout)] = Field(TeacherRollout(), description="Writes the first tokens")
    then: Annotated[Rollout, OneOf(Rollout)] = Field(StudentRollout(), description="Goes on from there")
    position: Annotated[int, OverSteps(ge=0)] = Field(16, description="Actions that the first source writes")

    @model_validator(mode="after")
    def _both_write(self) -> SwitchRollout:
        at, longest = round(extremes(self.position)[0]), max(self.first.longest, self.then.longest)
        if at >= longest:
            raise ValueError(
                f"position is {at}, and a trajectory has at most {longest} tokens: 'then' would never write; lower "
                "position, or raise then.max_new_tokens"
            )
        if at > self.first.longest:
            raise ValueError(
                f"position is {at}, and 'first' writes at most {self.first.longest} tokens; lower position, or raise "
                "first.max_new_tokens"
            )
        return self

    @property
    def budget(self) -> int:
        return self._most(self.position, self.first.budget, self.then.budget)

    @property
    def longest(self) -> int:
        return self._most(round(extremes(self.position)[1]), self.first.longest, self.then.longest)

    def _most(self, position: int, first: int, then: int) -> int:
        return min(max(first, then), min(position, first) + then)

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> Switched:
        sources = [part.build(context, student, teachers) for part in self.parts]
        if "data" in sources[1].authors:
            raise IncompatibleError("rollout.then is 'data'; a stored response cannot go on what another source began")
        return Switched(sources)


class Switched(Combination[SwitchRollout]):
    """The built switch."""

    def __call__(self, request: Request[SwitchRollout]) -> Trajectories:
        begin, go_on = self.sources
        before, after = request.settings.parts
        at = min(request.settings.position, request.budget, before.budget)
        left = min(request.budget - at, after.budget)
        if at == 0:
            return go_on(request.to(after, budget=left))
        first = begin(request.to(before, budget=at))
        # What ended by itself or was stopped stays as it is; the rest goes on, each from its own beginning.
        stopped = first.stopped or [None] * len(first)
        lost = [False] * len(first) if first.lost is None else first.lost.tolist()
        ended = [done or gone for done, gone in zip(first.finished.tolist(), lost, strict=True)]
        going = [i for i, over in enumerate(ended) if not over and stopped[i] is None]
        if not going or at == request.budget:
            return first
        own, begun = first.completions(), request.begun
        starts = [own[i] if begun is None else torch.cat([begun[i].to(own[i].device), own[i]]) for i in going]
        # Each is asked for alone, and still has draws of its own.
        members = [(first.prompts[i], i % request.group) for i in going]
        prompts = [replace(prompt, repeat=prompt.repeat * request.group + member) for prompt, member in members]
        asked = replace(request.to(after, budget=left), prompts=prompts)
        return continued(first, going, go_on(replace(asked, group=1, begun=starts)))

    def drawn(self, request: Request[SwitchRollout]) -> None:
        # What goes on is no stored trajectory, so only the one that begins takes turns.
        place = 0 if request.settings.position else 1
        self.sources[place].drawn(request.to(request.settings.parts[place]))
