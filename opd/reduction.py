"""From per-position values to one loss: a single global denominator, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from opd.trajectories import Trajectories

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]


def position_weights(
    trajectories: Trajectories,
    reduction: Reduction,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    learn: torch.Tensor | None = None,
    expected: int | None = None,
) -> torch.Tensor:
    """float32 `[N]` weights that turn a sum over positions into the global mean.

    `token_mean`: every learnt token of the whole batch weighs the same. `sequence_mean`: every trajectory does, and its
    tokens share its weight. `sequence_sum`: a trajectory's tokens are summed and the trajectories averaged, as papers
    write an expectation over trajectories; long ones then weigh more. The denominator counts all micro-batches and
    processes, so the gradient does not depend on how the batch is cut. Positions outside `learn` (bool `[N]`, by
    default the trajectories' own) weigh 0. With `expected` that many trajectories are the denominator in place of those
    that there are, so that what one trajectory contributes does not depend on the others.

    Raises:
        ValueError: `expected` with `token_mean`, whose denominator is a number of tokens.
    """
    learn = (trajectories.learnt if learn is None else learn).float()
    if reduction == "token_mean":
        if expected is not None:
            raise ValueError("token_mean has no expected number of trajectories; take a reduction by sequence")
        total = sum_over_processes(learn.sum())
        return learn / total.clamp(min=1)
    per_trajectory = sums_by_trajectory(learn, trajectories.lengths)
    share: float | torch.Tensor = 1.0
    if reduction == "sequence_mean":
        share = per_trajectory.clamp(min=1).repeat_interleave(trajectories.lengths.to(learn.device))
    if expected is not None:
        return learn / share / expected
    sequences = sum_over_processes((per_trajectory > 0).sum().float())
    return learn / share / sequences.clamp(min=1)


def sums_by_trajectory(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`[N]` numbers to the `[B]` sums over each trajectory's positions, with a graph where they have one."""
    count = len(lengths)
    owner = torch.arange(count, device=values.device).repeat_interleave(lengths.to(values.device))
    return torch.zeros(count, device=values.device).index_add(0, owner, values)


def running_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """int64 `[N]`: of whole numbers or bool `[N]`, the sums from the beginning of each trajectory up to each position,
    its own included."""
    total = values.long().cumsum(0)
    starts = (lengths.cumsum(0) - lengths).to(total.device)
    before = torch.cat([total.new_zeros(1), total])[starts]
    return total - before.repeat_interleave(lengths.to(total.device))
