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
) -> torch.Tensor:
    """float32 `[N]` weights that turn a sum over positions into the global mean.

    `token_mean`: every learnt token of the whole batch weighs the same. `sequence_mean`: every trajectory does, and its
    tokens share its weight. `sequence_sum`: a trajectory's tokens are summed and the trajectories averaged, as papers
    write an expectation over trajectories; long ones then weigh more. The denominator counts all micro-batches and
    processes, so the gradient does not depend on how the batch is cut. Positions outside `learn` (bool `[N]`, by
    default the trajectories' own) weigh 0.
    """
    learn = (trajectories.learnt if learn is None else learn).float()
    if reduction == "token_mean":
        total = sum_over_processes(learn.sum())
        return learn / total.clamp(min=1)
    owner = torch.arange(len(trajectories), device=learn.device).repeat_interleave(
        trajectories.lengths.to(learn.device)
    )
    per_trajectory = torch.zeros(len(trajectories), device=learn.device).index_add_(0, owner, learn)
    sequences = sum_over_processes((per_trajectory > 0).sum().float())
    share = 1.0 if reduction == "sequence_sum" else per_trajectory.clamp(min=1)[owner]
    return learn / share / sequences.clamp(min=1)
