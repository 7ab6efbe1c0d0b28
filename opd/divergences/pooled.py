"""Both streams of drafted blocks under one denominator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.distributions import Distribution, Target
from opd.divergences.base import Divergence
from opd.divergences.of_blocks import Accepted, OfBlocks, Rejected
from opd.objectives.of_slots import OfSlots
from opd.operator import Loss
from opd.schedules import OverSteps
from opd.trajectories import Trajectories


class Pooled(OfSlots, Divergence):
    """`(a sum_acc f + r sum_rej w_k g) / (a |acc| + r sum_rej w_k)` over the step: `accepted` and `rejected` pooled, as
    the code of Draft-OPD's authors does it, where the paper takes the mean of two means. `f` is the forward direction
    at accepted slots, `g` the reverse one at rejected slots with `w_k = decay ** (k - 1)`. The stream with more slots
    then counts more."""

    kind: Literal["pooled"] = "pooled"
    modality: ClassVar[str | None] = "language"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()
    accepts: ClassVar[tuple[str, ...]] = OfBlocks.accepts
    alternative: ClassVar[str] = OfBlocks.alternative

    accepted: Annotated[float, OverSteps(ge=0)] = Field(1.0, description="Factor `a` of an accepted slot")
    rejected: Annotated[float, OverSteps(ge=0)] = Field(1.0, description="Factor `r` of a rejected slot")
    decay: Annotated[float, OverSteps(gt=0, le=1)] = Field(
        0.8, description="Factor from a rejected slot to the next, from the beginning of the block"
    )
    correction: bool = Field(
        True, description="Whether the first slot of a block that was not accepted is in both streams"
    )
    estimator: Literal["whole", "token"] = Field(
        "token", description="Over the whole vocabulary, or from one token of each slot, as of `accepted`"
    )

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def streams(self) -> tuple[tuple[float, OfBlocks], tuple[float, OfBlocks]]:
        """Each with its factor."""
        return (
            (float(self.accepted), Accepted(correction=self.correction, estimator=self.estimator)),
            (float(self.rejected), Rejected(decay=float(self.decay), estimator=self.estimator)),
        )

    def slots(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        (a, accepted), (r, rejected) = self.streams
        return a * accepted.slots(columns) + r * rejected.slots(columns)

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        columns = self.columns(trajectories)
        together = self.slots(columns).to(weights.device)
        found = []
        for factor, stream in self.streams:
            share = factor * stream.slots(columns).to(weights.device) / together.where(together > 0, 1.0)
            loss = stream(student, targets, weights * share, trajectories, per_example)
            found.append((share, loss))
        (mine, first), (other, second) = found
        sums = [loss.per_example for loss in (first, second) if loss.per_example is not None]
        gaps = [loss.gap for loss in (first, second) if loss.gap is not None]
        return Loss(
            first.total + second.total,
            mine * first.values + other * second.values,
            second.log_probs.where(other > 0, first.log_probs),
            sums[0] + sums[1] if sums else None,
            gap=torch.maximum(*gaps) if gaps else None,
        )
