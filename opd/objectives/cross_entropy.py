"""Supervised training of a drafter: the text's own tokens at the slots of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from opd.distributions import Distribution, Target
from opd.objectives.of_slots import OfSlots, from_first
from opd.operator import Loss, action_loss
from opd.schedules import OverSteps
from opd.trajectories import Trajectories


class CrossEntropy(OfSlots):
    """`sum w_k (-log q(y)) / sum w_k` over the step, `y` the text's token at slot k of a block and
    `w_k = decay ** (k - 1)`: hard labels, as drafters are fine-tuned on texts of their target. It counts every slot
    where the text's token is known: all within a text whose blocks hold it, and of proposed blocks those that stood and
    the first that did not, which the target corrected. Soft labels are `accepted`. Logged: `nll`."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    called: ClassVar[str] = "nll"
    decay: Annotated[float, OverSteps(gt=0, le=1)] = Field(
        1.0, description="Factor from a slot to the next, from the beginning of the block; 1 weighs all alike"
    )

    def slots(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return from_first(columns, float(self.decay)) * (columns["verified"] >= 0)

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        verified = self.columns(trajectories)["verified"]
        known = verified >= 0
        loss = action_loss(
            lambda log_q, index: (-log_q, -torch.ones_like(log_q)),
            student,
            weights * known.to(weights.device),
            verified.where(known, trajectories.actions),
            trajectories.lengths,
            per_example=per_example,
        )
        return replace(loss, measured={"nll": loss.values})
