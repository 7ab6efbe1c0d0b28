"""`TopK`: the K largest log-probabilities of each state and the mass of everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from opd.distributions.base import Distribution
from opd.distributions.categorical import Categorical


@dataclass(frozen=True)
class TopK(Distribution):
    """Log-probabilities `[N, K]` of the ids `[N, K]`, normalised over the **whole** vocabulary; the rest is the tail.

    The tail is one bucket of mass `1 - sum(exp(log_probs))`. Leaving it out, with both sides renormalised over the K
    ids, is another objective, which asks for no mass on the teacher's ids: see `OnSupport.tail`.
    """

    kind: ClassVar[str] = "top_k"
    log_probs: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    def select(self, index: slice | torch.Tensor) -> Self:
        return type(self)(self.log_probs[index], self.ids[index])

    def detach(self) -> Self:
        return type(self)(self.log_probs.detach(), self.ids)

    def with_tail(self) -> torch.Tensor:
        """float32 log-probabilities `[N, K + 1]` over the K ids and the tail bucket."""
        return append_tail(self.log_probs.float())

    @staticmethod
    def of(full: Categorical, k: int, rows: int = 128) -> TopK:
        """The top `k` of a full distribution, `rows` positions at a time."""
        values, ids = [], []
        for start in range(0, len(full), rows):
            top = full.select(slice(start, start + rows)).log_probs().topk(k, dim=-1)
            values.append(top.values)
            ids.append(full.vocabulary.named(top.indices))
        return TopK(torch.cat(values), torch.cat(ids))


def append_tail(log_probs: torch.Tensor) -> torch.Tensor:
    """`[C, K]` log-probabilities -> `[C, K + 1]` with `log(1 - sum)` last, bounded away from log 0 by 1e-7 of mass."""
    covered = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, torch.log(-torch.expm1(covered))], dim=-1)
