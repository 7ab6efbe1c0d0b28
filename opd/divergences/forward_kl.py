"""Forward KL: the student covers everything that the teacher does."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from opd.divergences.operator import OnSupport


class ForwardKL(OnSupport):
    """`KL(p || q) = sum_v p (log p - log q)`; gradient in the logits `q - p`."""

    kind: Literal["forward_kl"] = "forward_kl"
    descends: ClassVar[str] = "forward_kl"

    def value_and_grad(self, log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = log_p - log_q
        p = log_p.exp_()
        value = torch.linalg.vecdot(p, ratio)
        return value, log_q.exp_().sub_(p)
