"""Policies: the student, and how it turns trajectories into distributions with a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel

from opd.checkpoints.weights import copy_into, fingerprint, frozen, trained
from opd.choice import Choice
from opd.context import Context
from opd.distributions import Distribution
from opd.prompts import Prompt
from opd.sharding import fill
from opd.trajectories import Trajectories


class Student(ABC):
    """A built policy. `module` is what the update trains and `accelerate` wraps."""

    module: torch.nn.Module
    context: Context
    skeleton: torch.nn.Module | None = None
    """The module's structure without weights, where the update shards them over processes."""

    @abstractmethod
    def __call__(self, trajectories: Trajectories) -> Distribution:
        """The student's distribution at the N positions of `trajectories`, with a graph when gradients are on."""

    @abstractmethod
    def agree(self, context: Context, teachers: Sequence[Any], end_tokens: Sequence[int] | None) -> Context:
        """Settle what student and teachers must share (vocabulary, end tokens), or raise what does not fit."""

    @abstractmethod
    def check_prompts(self, prompts: Sequence[Prompt], limit: int) -> None:
        """Raise `DataError` for a prompt that cannot be encoded or is longer than `limit`."""

    @abstractmethod
    def check_head(self, trajectories: Trajectories) -> float:
        """Largest relative difference between the model's own outputs and those that the loss will be computed from."""

    @abstractmethod
    def decode(self, actions: torch.Tensor) -> str:
        """A trajectory's actions as a person reads them."""

    @abstractmethod
    def tokens(self, actions: torch.Tensor) -> list[str]:
        """Each action as a person reads it."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What training moves: all weights, or with frozen parts and LoRA the others only."""
        return trained(extract_model_from_parallel(self.module))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        copy_into(self.state_dict(), state, "student")

    def fingerprint(self) -> str:
        """Of the weights that `state_dict` leaves out."""
        return fingerprint(frozen(extract_model_from_parallel(self.module)))

    def unwrap(self, accelerator: Any) -> None:
        """After training: `module` without what `accelerate` put around it. Of sharded weights the main process gets
        the whole, on the CPU; all must call."""
        self.module = accelerator.unwrap_model(self.module)
        if self.skeleton is not None:
            self.module = fill(self.skeleton, self.module, accelerator.is_main_process) or self.module

    @abstractmethod
    def save(self, folder: Path, card: str) -> None:
        """Write what the library of the model's kind loads without `opd`, with a model card."""


class Policy(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "policy"

    @abstractmethod
    def build(self, context: Context) -> Any:
        """Load the student on to `context.device`."""
