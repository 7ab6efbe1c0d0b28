"""Policies: the student, and how it turns trajectories into distributions with a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from opd.choice import Choice
from opd.context import Context
from opd.distributions import Distribution
from opd.prompts import Prompt
from opd.trajectories import Trajectories


class Student(ABC):
    """A built policy. `module` is what the update trains and `accelerate` wraps."""

    module: torch.nn.Module

    @abstractmethod
    def __call__(self, trajectories: Trajectories) -> Distribution:
        """The student's distribution at the N positions of `trajectories`, with a graph when gradients are on."""

    @abstractmethod
    def decode(self, prompt: Prompt, actions: torch.Tensor) -> str:
        """A trajectory's actions as a person reads them."""

    @abstractmethod
    def save(self, folder: Path, card: str) -> None:
        """Write what the library of the model's kind loads without `opd`, with a model card."""


class Policy(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "policy"

    @abstractmethod
    def build(self, context: Context) -> Any:
        """Load the student on to `context.device`."""
