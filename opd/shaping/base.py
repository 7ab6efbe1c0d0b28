"""Shaping: how much each state counts, from what student and teachers say of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch

from opd.choice import Choice
from opd.context import Context
from opd.distributions import Distribution
from opd.divergences import Target
from opd.trajectories import Trajectories


class Shaper(Protocol):
    """A built shaping that keeps something between steps; with `state_dict` and `load_state_dict` that is in a
    checkpoint. `settings` are the shaping's at this step, numbers in the places of schedules."""

    def __call__(
        self, student: Distribution, targets: Sequence[Target], trajectories: Trajectories, settings: Shaping
    ) -> torch.Tensor: ...


class Shaping(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "shaping"

    def build(self, context: Context) -> Shaping | Shaper:
        """What weighs the positions of a run: these settings themselves, or with a state a `Shaper` of them."""
        return self

    @abstractmethod
    def __call__(self, student: Distribution, targets: Sequence[Target], trajectories: Trajectories) -> torch.Tensor:
        """float32 `[N]` weights, detached; 1 leaves a position as it is, 0 takes it out of the loss."""
