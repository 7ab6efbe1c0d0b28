"""Some trajectories from one source and some from another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from opd.choice import OneOf
from opd.context import Context
from opd.prompts import Prompt
from opd.rollouts.base import PrefixSource, Rollout, divided
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout
from opd.schedules import OverSteps
from opd.trajectories import Trajectories


class MixtureRollout(Rollout):
    """Each prompt (or the whole batch) goes to `first` with probability `share`, else to `second`; a schedule of
    `share` from 0 to 1 moves from the teacher's states to the student's."""

    kind: Literal["mixture"] = "mixture"
    first: Annotated[Rollout, OneOf(Rollout)] = StudentRollout()
    second: Annotated[Rollout, OneOf(Rollout)] = TeacherRollout()
    share: Annotated[float, OverSteps(ge=0, le=1)] = Field(0.5, description="Probability of the first source")
    by: Literal["prompt", "batch"] = "prompt"

    @property
    def budget(self) -> int:
        return max(self.first.budget, self.second.budget)

    def build(self, context: Context, student: Any, teachers: Sequence[Any]) -> Mixed:
        sources = self.first.build(context, student, teachers), self.second.build(context, student, teachers)
        return Mixed(self, context, *sources)


class Mixed(PrefixSource):
    """The built mixture."""

    exact = False

    def __init__(self, settings: MixtureRollout, context: Context, first: PrefixSource, second: PrefixSource):
        self.settings, self.context, self.first, self.second = settings, context, first, second
        self.authors = first.authors | second.authors
        self.current = first.current and second.current

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        self.first.check_prompts(prompts)
        self.second.check_prompts(prompts)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        budget: int,
        stream: int,
        begun: Sequence[torch.Tensor] | None = None,
    ) -> Trajectories:
        self.first.settings, self.second.settings = self.settings.first, self.settings.second
        names = [p.id if self.settings.by == "prompt" else "" for p in prompts]
        draws = [random.Random(f"{self.context.seed}/{stream}/{name}").random() for name in names]
        shares = [
            (source, [i for i, draw in enumerate(draws) if (draw < self.settings.share) == wanted])
            for source, wanted in ((self.first, True), (self.second, False))
        ]
        return divided(shares, prompts, group, budget, stream, begun)
