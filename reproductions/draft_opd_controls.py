"""A control of the reproduction of Draft-OPD: blocks whose teacher speaks of another place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from opd.context import Context
from opd.distributions import Categorical
from opd.rollouts.anchored import Anchored, AnchoredRollout
from opd.rollouts.request import Request
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class Misplaced(AnchoredRollout):
    """`anchored`, with what the target says of each block handed on to the next one of the step."""

    kind: Literal["misplaced"] = "misplaced"  # type: ignore[assignment]

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> MisplacedBlocks:
        made = super().build(context, student, teachers)
        return MisplacedBlocks(self, made.sources[0], made.drafting)


class MisplacedBlocks(Anchored):
    """The built rollout."""

    @torch.no_grad()
    def __call__(self, request: Request[AnchoredRollout]) -> Trajectories:
        found = super().__call__(request)
        assert found.answers is not None
        (answer,) = found.answers
        assert isinstance(answer.distribution, Categorical)
        # Of every block there are as many slots.
        slots = int(found.columns["slot"].max())
        moved = answer.distribution.hidden.roll(slots, 0)
        return replace(found, answers=(replace(answer, distribution=replace(answer.distribution, hidden=moved)),))
