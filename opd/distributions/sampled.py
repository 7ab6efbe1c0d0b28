"""`Sampled`: all that is known of each state is the log-probability of the action that was taken there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from opd.distributions.base import Distribution
from opd.distributions.categorical import Categorical
from opd.distributions.routed import Routed


@dataclass(frozen=True)
class Sampled(Distribution):
    """Log-probability `[N]` of the action taken at each position, normalised over the whole vocabulary."""

    kind: ClassVar[str] = "sampled"
    log_probs: torch.Tensor

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    def select(self, index: slice | torch.Tensor) -> Self:
        return type(self)(self.log_probs[index])

    def detach(self) -> Self:
        return type(self)(self.log_probs.detach())

    @staticmethod
    def of(answer: Distribution, actions: torch.Tensor, rows: int = 128) -> Sampled:
        """What an answer says about `actions` `[N]`, `rows` positions at a time of a full distribution."""
        if isinstance(answer, Sampled):
            return answer
        assert isinstance(answer, Categorical | Routed)
        columns = answer.vocabulary.columns(actions)
        parts = [
            answer.select(slice(start, start + rows))
            .log_probs()
            .gather(1, columns[start : start + rows, None])
            .squeeze(1)
            for start in range(0, len(answer), rows)
        ]
        return Sampled(torch.cat(parts))
