"""Whether the teacher would have taken the student's token among its likely ones."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from opd.compatibility.base import Compatibility


class TopPAcceptance(Compatibility):
    """1 where the token taken is in the teacher's smallest set of mass `p`, else 0; looked for among the teacher's `k`
    likeliest ids, all of which are accepted if they do not reach that mass."""

    kind: Literal["top_p_acceptance"] = "top_p_acceptance"
    measured: ClassVar[str] = "accepted"
    p: float = Field(0.7, gt=0, le=1, description="Mass of the set; a token outside of it is a drift event")

    @property
    def threshold(self) -> float:
        return 0.5

    def of_rows(
        self,
        student: tuple[torch.Tensor, torch.Tensor],
        teacher: tuple[torch.Tensor, torch.Tensor],
        actions: torch.Tensor,
    ) -> torch.Tensor:
        log_probs, ids = teacher
        probs = log_probs.exp()
        inside = probs.cumsum(-1) - probs < self.p
        return ((ids == actions[:, None]) & inside).any(-1).float()
