"""Generalised Jensen-Shannon divergence, in the convention of GKD: the teacher carries beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from opd.divergences.forward_kl import ForwardKL
from opd.divergences.operator import OnSupport
from opd.divergences.reverse_kl import ReverseKL


class JensenShannon(OnSupport):
    """`beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 - beta) q` (Agarwal et al. 2024).

    beta = 0 means forward KL and beta = 1 reverse KL. Those are special cases, not limits: the formula is 0 at both
    ends, so the scale of the loss jumps there. This is not a mixture of the two KLs: see `mixture`.
    """

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    descends: ClassVar[str] = "jensen_shannon"
    buffers: ClassVar[int] = 2
    beta: float = Field(0.5, ge=0.0, le=1.0)

    def value_and_grad(
        self, log_p: torch.Tensor, log_q: torch.Tensor, scratch: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        beta = self.beta
        if beta in (0.0, 1.0):
            end = ReverseKL() if beta else ForwardKL()
            return end.value_and_grad(log_p, log_q, scratch)
        p = torch.exp(log_p, out=scratch[0])
        negative_entropy = torch.linalg.vecdot(p, log_p)
        q = torch.exp(log_q, out=log_p)
        mixture = torch.mul(p, beta, out=scratch[1]).add_(q, alpha=1 - beta)
        # Where both underflow the terms are 0 * log m; the floor keeps that 0 instead of NaN.
        log_m = mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()
        value = (negative_entropy - torch.linalg.vecdot(p, log_m)) * beta
        student_side = log_q.sub_(log_m)
        inner = torch.linalg.vecdot(q, student_side)
        return value.add_(inner, alpha=1 - beta), student_side.sub_(inner[:, None]).mul_(1 - beta).mul_(q)
