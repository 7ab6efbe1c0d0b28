"""What drift events do to the positions behind them: a weight that only falls, and the length up to which it lasts."""

from __future__ import annotations

import math

import torch

from opd.reduction import running_sums


def most_events(drop: float) -> int:
    """How many events it takes until nothing of the weight is left. Counted in whole numbers, since sums of `drop` miss
    zero by rounding."""
    return math.ceil(1 / drop - 1e-9)


def decayed(events: torch.Tensor, lengths: torch.Tensor, drop: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 `[N]` of packed positions, `1 - drop * events so far` and not below 0, the position's own event
    included; and bool `[N]`, where the weight is not used up.

    Args:
        events: bool `[N]`.
        lengths: int64 `[B]`, positions of each trajectory.
        drop: what one event takes away.
    """
    count = running_sums(events, lengths)
    lasts = count < most_events(drop)
    return (1 - drop * count.float()).clamp(min=0) * lasts, lasts
