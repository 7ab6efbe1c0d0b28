"""Which of the likeliest ids both sides have: the signal of Prune-OPD."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from opd.compatibility.base import Compatibility, shared


class Overlap(Compatibility):
    """`|S n U| / k` of the student's and the teacher's `k` likeliest ids; probabilities do not enter. Models that were
    trained apart rank what neither ever says by chance, so it tells something where both come of one model."""

    kind: Literal["overlap"] = "overlap"
    measured: ClassVar[str] = "overlap"
    below: float = Field(0.7, gt=0, le=1, description="A state with a smaller share of ids in common is a drift event")

    @property
    def threshold(self) -> float:
        return self.below

    def of_rows(
        self,
        student: tuple[torch.Tensor, torch.Tensor],
        teacher: tuple[torch.Tensor, torch.Tensor],
        actions: torch.Tensor,
    ) -> torch.Tensor:
        return shared(student[1], teacher[1]).float().mean(-1)
