"""Half the squared log-ratio of given tokens, whoever wrote them."""

from __future__ import annotations

from typing import Literal

import torch

from opd.divergences.on_action import OnAction
from opd.objectives.base import Writing


class SquaredLogRatio(OnAction):
    """`0.5 (log p(a_t) - log q(a_t))^2` of the tokens that stand there, whoever wrote them: on reference answers the
    off-policy arm OP-RKD of Video-OPD, whose update is that of `reverse_kl_sampled` and which descends this and no KL,
    since the student did not draw them. On tokens that it draws now the expected gradient is that of reverse KL (the k2
    identity).
    """

    kind: Literal["squared_log_ratio"] = "squared_log_ratio"

    @property
    def descends(self) -> str:
        return "reverse_kl on own samples; squared log-ratio on others"

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def value_and_coefficient(
        self, log_p: torch.Tensor, log_q: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = log_q - log_p
        return 0.5 * ratio.square(), ratio

    def check_trajectories(self, rollout: Writing) -> None:
        """It is what it says on any tokens."""
