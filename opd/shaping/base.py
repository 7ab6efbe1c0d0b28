"""Shaping: how much each state counts, from what student and teachers say of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from opd.choice import Choice
from opd.distributions import Distribution
from opd.divergences import Target
from opd.trajectories import Trajectories


class Shaping(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "shaping"

    @abstractmethod
    def __call__(self, student: Distribution, targets: Sequence[Target], trajectories: Trajectories) -> torch.Tensor:
        """float32 `[N]` weights, detached; 1 leaves a position as it is, 0 takes it out of the loss."""
