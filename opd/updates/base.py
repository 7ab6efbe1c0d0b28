"""Updates: how gradients become a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from accelerate import Accelerator

from opd.choice import Choice
from opd.objectives import Loss
from opd.policies.base import Student


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
    """

    per_example: bool = False
    expected: bool = False
    takes_empty: bool = False
    writes_rollouts: bool = True

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

    @abstractmethod
    def build(self, student: Student, accelerator: Accelerator) -> Optimiser:
        """Make the optimiser over the student's trainable parameters and wrap `student.module`."""
