"""Linear mixing of the two KLs (Decoupling KL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.divergences.on_support import OnSupport
from opd.schedules import OverSteps


class Mixture(OnSupport):
    """`reverse_weight * KL(q || p) + (1 - reverse_weight) * KL(p || q)`. Not a Jensen-Shannon divergence."""

    kind: Literal["mixture"] = "mixture"
    buffers: ClassVar[int] = 2
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"reverse_weight": 0.25}, {"reverse_weight": 0.75})
    reverse_weight: Annotated[float, OverSteps(ge=0, le=1)] = Field(
        0.5, description="Share of reverse KL; the rest is forward KL"
    )

    @property
    def descends(self) -> str:
        return self.given_ids(f"{self.reverse_weight:g} reverse_kl + {1 - self.reverse_weight:g} forward_kl")

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        ratio = log_q - log_p
        return ((self.reverse_weight * log_q.exp() - (1 - self.reverse_weight) * log_p.exp()) * ratio).sum(-1)

    def value_and_grad(
        self, log_p: torch.Tensor, log_q: torch.Tensor, scratch: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lam = self.reverse_weight
        p = torch.exp(log_p, out=scratch[0])
        ratio = torch.sub(log_q, log_p, out=log_p)
        q = log_q.exp_()
        reverse = torch.mul(q, ratio, out=scratch[1]).sum(-1)
        forward = -torch.mul(p, ratio, out=scratch[1]).sum(-1)
        grad = ratio.sub_(reverse[:, None]).mul_(lam).add_(1 - lam).mul_(q)
        return lam * reverse + (1 - lam) * forward, grad.sub_(p, alpha=1 - lam)
