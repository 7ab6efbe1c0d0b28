"""Forward KL: the student covers everything that the teacher does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from opd.divergences.on_support import OnSupport


class ForwardKL(OnSupport):
    """`KL(p || q) = sum_v p (log p - log q)`; gradient in the logits `q - p`."""

    kind: Literal["forward_kl"] = "forward_kl"
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"top_k": 4},
        {"top_k": 4, "support_from": "student"},
        {"top_k": 4, "tail": "none"},
    )

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def value_and_grad(
        self, log_p: torch.Tensor, log_q: torch.Tensor, scratch: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        p = torch.exp(log_p, out=scratch[0])
        value = log_p.sub_(log_q).mul_(p).sum(-1)
        return value, log_q.exp_().sub_(p)
