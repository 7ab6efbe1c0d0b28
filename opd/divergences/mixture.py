"""Linear mixing of the two KLs (Decoupling KL)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from opd.divergences.operator import OnSupport


class Mixture(OnSupport):
    """`reverse_weight * KL(q || p) + (1 - reverse_weight) * KL(p || q)`. Not a Jensen-Shannon divergence."""

    kind: Literal["mixture"] = "mixture"
    descends: ClassVar[str] = "mixture"
    reverse_weight: float = Field(0.5, ge=0.0, le=1.0)

    def value_and_grad(self, log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lam = self.reverse_weight
        ratio = log_q - log_p
        p, q = log_p.exp_(), log_q.exp_()
        reverse = torch.linalg.vecdot(q, ratio)
        forward = -torch.linalg.vecdot(p, ratio)
        grad = ratio.sub_(reverse[:, None]).mul_(q).mul_(lam)
        return lam * reverse + (1 - lam) * forward, grad.add_(q.sub_(p), alpha=1 - lam)
