"""Reverse KL: the student keeps to what the teacher finds likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from opd.divergences.on_support import OnSupport


class ReverseKL(OnSupport):
    """`KL(q || p) = sum_v q (log q - log p)`; gradient in the logits `q * (log(q/p) - KL)`."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"top_k": 4},
        {"top_k": 4, "support_from": "student"},
        {"top_k": 4, "tail": "none"},
        {"top_k": 4, "support_from": "student", "tail": "none"},
    )

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def value_and_grad(
        self, log_p: torch.Tensor, log_q: torch.Tensor, scratch: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = torch.sub(log_q, log_p, out=log_p)
        q = log_q.exp_()
        value = torch.mul(q, ratio, out=scratch[0]).sum(-1)
        return value, ratio.sub_(value[:, None]).mul_(q)
