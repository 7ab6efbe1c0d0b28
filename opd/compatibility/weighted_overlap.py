"""How much of the student's mass both sides look at."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from opd.compatibility.base import Compatibility, shared


class WeightedOverlap(Compatibility):
    """The share of the probability of the student's `k` likeliest ids that lies on those among the teacher's; ids that
    the student all but never says count for nothing."""

    kind: Literal["weighted_overlap"] = "weighted_overlap"
    measured: ClassVar[str] = "weighted_overlap"
    below: float = Field(0.95, gt=0, le=1, description="A state with less of that mass in common is a drift event")

    @property
    def threshold(self) -> float:
        return self.below

    def of_rows(
        self,
        student: tuple[torch.Tensor, torch.Tensor],
        teacher: tuple[torch.Tensor, torch.Tensor],
        actions: torch.Tensor,
    ) -> torch.Tensor:
        log_probs, ids = student
        return (log_probs.softmax(-1) * shared(ids, teacher[1])).sum(-1)
