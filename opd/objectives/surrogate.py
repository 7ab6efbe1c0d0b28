"""The clipped surrogate of policy gradients, for any distribution over actions."""

from __future__ import annotations

import torch


def clipped(
    log_q: torch.Tensor, behaviour: torch.Tensor, advantage: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`-min(r A, clip(r, low, high) A)` with `r = q / behaviour` (Schulman et al. 2017).

    Args:
        log_q, behaviour: `[C]` log-probabilities of the actions under the student, detached, and when they were drawn.
        advantage: `[C]`, detached.

    Returns:
        `[C]` values and `[C]` coefficients: a position's gradient is `coefficient * grad log q(action)`.
    """
    ratio = (log_q - behaviour).exp()
    free, bounded = ratio * advantage, ratio.clamp(low, high) * advantage
    return -torch.minimum(free, bounded), torch.where(free <= bounded, -free, torch.zeros_like(free))
