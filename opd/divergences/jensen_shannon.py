"""Generalised Jensen-Shannon divergence, in the convention of GKD: the teacher carries beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.divergences.forward_kl import ForwardKL
from opd.divergences.operator import OnSupport
from opd.divergences.reverse_kl import ReverseKL
from opd.schedules import OverSteps


class JensenShannon(OnSupport):
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q` (Agarwal et al. 2024).

    beta = 0 means forward KL and beta = 1 reverse KL. Those are special cases, not limits: the formula is 0 at both
    ends, so the scale of the loss jumps there. This is not a mixture of the two KLs: see `mixture`.
    """

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    buffers: ClassVar[int] = 2
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        *({"beta": beta} for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
        {"beta": 0.5, "top_k": 4},
        {"beta": 0.5, "top_k": 4, "support_from": "student"},
    )
    beta: Annotated[float, OverSteps(ge=0, le=1)] = Field(
        0.5, description="Weight of the teacher in the mean distribution"
    )

    @property
    def descends(self) -> str:
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, f"jensen_shannon({self.beta:g})")

    @property
    def curvature(self) -> float:
        return 1.0 if self.beta in (0.0, 1.0) else self.beta * (1 - self.beta)

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        if self.beta in (0.0, 1.0):
            return (ReverseKL() if self.beta else ForwardKL()).exact(log_p, log_q)
        p, q = log_p.exp(), log_q.exp()
        log_m = (self.beta * p + (1 - self.beta) * q).log()
        return self.beta * (p * (log_p - log_m)).sum(-1) + (1 - self.beta) * (q * (log_q - log_m)).sum(-1)

    def value_and_grad(
        self, log_p: torch.Tensor, log_q: torch.Tensor, scratch: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        beta = self.beta
        if beta in (0.0, 1.0):
            end = ReverseKL() if beta else ForwardKL()
            return end.value_and_grad(log_p, log_q, scratch)
        p = torch.exp(log_p, out=scratch[0])
        negative_entropy = torch.mul(p, log_p, out=scratch[1]).sum(-1)
        q = torch.exp(log_q, out=log_p)
        mixture = torch.mul(p, beta, out=scratch[1]).add_(q, alpha=1 - beta)
        # Where both underflow the terms are 0 * log m; the floor keeps that 0 instead of NaN.
        log_m = mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()
        value = (negative_entropy - p.mul_(log_m).sum(-1)) * beta
        student_side = log_q.sub_(log_m)
        inner = torch.mul(q, student_side, out=scratch[0]).sum(-1)
        return value.add_(inner, alpha=1 - beta), student_side.sub_(inner[:, None]).mul_(1 - beta).mul_(q)
