"""Updates: how gradients become a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator

from opd.choice import Choice
from opd.distributions import Distribution
from opd.objectives import Loss
from opd.policies.base import Student


@dataclass(frozen=True)
class Planned:
    """What is known of a run before its first step.

    Attributes:
        records: training prompts.
        expected: prompts of a step in expectation.
        steps: of the whole run.
        folder: the run directory.
        draws_known: who reads the recipe can tell which prompts each step draws.
    """

    records: int
    expected: int
    steps: int
    folder: Path
    draws_known: bool = False


class Optimiser(ABC):
    """A built update. The numbers of a step, a rate that follows a schedule, come with `apply`.

    Attributes:
        per_example: each loss has `per_example`, `[B]` with a graph, so that gradients can be made one by one.
        expected: losses are divided by the number of trajectories that a step has in expectation, `batch.prompts *
            batch.group`, and not by how many it has: what draws of random size need. Tokens have no such number, so the
            recipe's `reduction` must be by sequence then.
        takes_empty: `apply` is called for every step, also when nothing can be learnt, or nothing was drawn at all;
            otherwise such steps are not taken.
        writes_rollouts: trajectories of training prompts are written to rollouts.jsonl, and so are in the report.
        ended_by: why no further step may be taken, in words; None as long as one may.
    """

    per_example: bool = False
    expected: bool = False
    takes_empty: bool = False
    writes_rollouts: bool = True
    ended_by: str | None = None

    def begin(self, planned: Planned) -> list[str]:
        """Told once, before the first step and before a checkpoint is taken up; returns lines for a person."""
        return []

    def recall(self) -> list[str]:
        """Told by a process that goes on with an earlier one's run, checkpoint or not, before anything is cleared;
        returns lines for a person."""
        return []

    def opened(self, student: Distribution, lengths: torch.Tensor) -> Distribution:
        """The student's `[N]` distributions of the micro-batch that `accumulate` comes for next, as objectives shall
        see them; `lengths`, int64 `[B]`, are those of its trajectories."""
        return student

    def facts(self) -> dict[str, Any]:
        """What a run's summary says of it, by name."""
        return {}

    @abstractmethod
    def accumulate(self, losses: Sequence[Loss], last: bool) -> None:
        """Backward of the sum of one micro-batch's losses; `last` marks the final one of the step: gradients are
        synchronised then."""

    @abstractmethod
    def discard(self) -> None:
        """Forget what was accumulated since the last step."""

    @abstractmethod
    def apply(self, settings: Update, finite: bool = True) -> dict[str, float]:
        """Take the step under its `settings` and clear the gradients; returns `gradient_norm`, `learning_rate` and the
        like.

        When the loss was not `finite`, or the gradient is not, the weights and all that belongs to them stay as they
        are, and `skipped` is 1.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Around whatever wants the student as it is measured and saved: with averaged weights, where the update keeps
        any."""
        return nullcontext()

    def settle(self) -> None:  # noqa: B027
        """Leave those weights in the student, for good."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, beside the student's weights."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


class Update(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "update"
    private: ClassVar[bool] = False
    """Whether it promises that no single record shows in the student: then whatever would show one is refused."""

    @property
    def revealed(self) -> Sequence[str]:
        """Where records may show all the same (`opd.recipe.private`)."""
        return ()

    def told(self, planned: Planned) -> list[tuple[str, str]]:
        """What a plan says of it, by name."""
        return []

    @abstractmethod
    def build(self, student: Student, accelerator: Accelerator) -> Optimiser:
        """Make the optimiser over the student's trainable parameters and wrap `student.module`."""
