"""Every state counts the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from opd.context import Context
from opd.distributions import Distribution, Target
from opd.shaping.base import Shape, Shaper, Shaping
from opd.trajectories import Trajectories


class Uniform(Shaping):
    """Weight 1 everywhere."""

    kind: Literal["uniform"] = "uniform"
    alone: ClassVar[bool] = True

    @property
    def weighs(self) -> bool:
        return False

    def build(self, context: Context) -> UniformShaper:
        return UniformShaper()


class UniformShaper(Shaper[Uniform]):
    """The built shaping."""

    def __call__(
        self, student: Distribution, targets: Sequence[Target], micro: Trajectories, settings: Uniform
    ) -> Shape:
        return Shape(torch.ones(micro.positions, device=micro.actions.device))
