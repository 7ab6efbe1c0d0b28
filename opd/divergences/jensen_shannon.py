"""Generalised Jensen-Shannon divergence, in the convention of GKD: the teacher carries beta."""

from __future__ import annotations

import math
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
    beta: float = Field(0.5, ge=0.0, le=1.0)

    def value_and_grad(self, log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.beta in (0.0, 1.0):
            end = ReverseKL() if self.beta else ForwardKL()
            return end.value_and_grad(log_p, log_q)
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        teacher_side = log_p - log_m
        value = self.beta * torch.linalg.vecdot(log_p.exp_(), teacher_side)
        student_side = torch.sub(log_q, log_m, out=log_m)
        q = log_q.exp_()
        inner = torch.linalg.vecdot(q, student_side)
        value += (1 - self.beta) * inner
        return value, student_side.sub_(inner[:, None]).mul_(q).mul_(1 - self.beta)
