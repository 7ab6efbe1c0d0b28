"""Every state counts the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from opd.distributions import Distribution
from opd.divergences import Target
from opd.shaping.base import Shaping
from opd.trajectories import Trajectories


class Uniform(Shaping):
    """Weight 1 everywhere."""

    kind: Literal["uniform"] = "uniform"

    def __call__(self, student: Distribution, targets: Sequence[Target], trajectories: Trajectories) -> torch.Tensor:
        return torch.ones(trajectories.positions, device=trajectories.actions.device)
