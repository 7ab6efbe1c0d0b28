"""Updates: how gradients become a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from opd.choice import Choice
from opd.divergences import Loss
from opd.policies.base import Student


class Optimiser(ABC):
    """A built update."""

    @abstractmethod
    def accumulate(self, loss: Loss, last: bool) -> None:
        """Backward of one micro-batch; `last` marks the final one of the step (gradients are then synchronised)."""

    @abstractmethod
    def apply(self) -> dict[str, float]:
        """Take the step and clear the gradients; returns `gradient_norm`, `learning_rate` and the like."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, beside the student's weights."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


class Update(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "update"

    @abstractmethod
    def build(self, student: Student, accelerator: Any, steps: int) -> Optimiser:
        """Make the optimiser over the student's trainable parameters and wrap `student.module`."""
