"""Rollouts: who extends the prompts, that is, on whose states the student learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from opd.choice import Choice
from opd.context import Context
from opd.prompts import Prompt
from opd.trajectories import Trajectories


class PrefixSource(ABC):
    """A built rollout.

    Attributes:
        exact: actions are drawn from the student's whole distribution, up to the rounding of `dtype`.
        dtype: what the sampler computes in.
    """

    exact: bool = True
    dtype: torch.dtype = torch.float32

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], group: int, budget: int, stream: int) -> Trajectories:
        """`group` trajectories of each prompt, at most `budget` actions long.

        `stream` names the random stream (the loop passes the step); the same recipe seed, stream and prompts give
        the same trajectories.
        """


class Rollout(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "rollout"

    @property
    @abstractmethod
    def budget(self) -> int:
        """Most actions of one trajectory, unless the curriculum says less."""

    @abstractmethod
    def build(self, context: Context, student: Any) -> PrefixSource:
        """Make the rollout of a built student."""
