"""Base of scenes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch


class Scene(ABC):
    """A student and a teacher, and Y draws with their exact probabilities. A gradient's shape is that of the student's
    numbers."""

    @classmethod
    @abstractmethod
    def random(cls, seed: int) -> Self:
        """One of them, the same for the same seed."""

    @abstractmethod
    def law(self) -> torch.Tensor:
        """float64 `[Y]`: the probability of each draw under the student."""

    @abstractmethod
    def gradients(self, divergence: Any) -> torch.Tensor:
        """float64 `[Y, ...]`: the gradient that training with `divergence` computes for each draw."""

    @abstractmethod
    def promised(self, divergence: Any) -> torch.Tensor:
        """float64 `[...]`: the gradient of the exact divergence that `divergence` promises to descend, on the student's
        own states."""

    @abstractmethod
    def kls(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 `[...]` each: the gradients of exact forward and reverse KL, for orientation."""
