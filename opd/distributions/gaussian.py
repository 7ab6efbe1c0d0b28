"""`Gaussian`: the next latent of a flow-matching sampler, with one standard deviation for all of its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch

from opd.distributions.base import Distribution


@dataclass(frozen=True)
class Gaussian(Distribution):
    """`x ~ Normal(mean, std^2 I)`. At one state every model has the same `std`, `step` and `gain`: they are the
    sampler's, and only the mean is the model's.

    Attributes:
        mean: float32 `[N, ...]`.
        std: float32 `[N]`.
        step: float32 `[N]`, the sampler's step in time.
        gain: float32 `[N]`, how far the mean moves with one unit of the model's velocity: the divergence of two models
            is `(gain / std)^2 / 2` times the square of their velocities' difference.
    """

    kind: ClassVar[str] = "gaussian"
    mean: torch.Tensor
    std: torch.Tensor
    step: torch.Tensor
    gain: torch.Tensor

    def __len__(self) -> int:
        return self.mean.shape[0]

    def select(self, index: slice | torch.Tensor) -> Self:
        return type(self)(*(getattr(self, f.name)[index] for f in fields(self)))

    def detach(self) -> Self:
        return type(self)(*(getattr(self, f.name).detach() for f in fields(self)))

    def square(self, x: torch.Tensor) -> torch.Tensor:
        """float32 `[N]`: mean over the numbers of one state of `((x - mean) / std)^2`."""
        return (x.float() - self.mean).square().flatten(1).mean(1) / self.std.square()

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """float32 `[N]`: log-density of `actions` `[N, ...]`, the mean over the numbers of each (not their sum)."""
        return -0.5 * self.square(actions) - self.std.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, other: Gaussian) -> torch.Tensor:
        """float32 `[N]`: `KL(self || other)`, the mean over the numbers of each state; `std` is common to both."""
        return 0.5 * self.square(other.mean)
