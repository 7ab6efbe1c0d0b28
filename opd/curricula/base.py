"""Curricula: which prompts come next, and how far they may be extended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from opd.choice import Choice
from opd.context import Context
from opd.prompts import Prompt


@dataclass(frozen=True)
class Draw:
    """One step's prompts, the budget of actions for each of their trajectories (None is the rollout's own), and what
    the curriculum wants logged."""

    prompts: list[Prompt]
    budget: int | None = None
    signals: dict[str, float] = field(default_factory=dict)


class Schedule(ABC):
    """A built curriculum; everything that it remembers is in `state_dict`."""

    @abstractmethod
    def next(self, step: int, signals: Mapping[str, float]) -> Draw | None:
        """The draw of `step` (from 0), or None when the curriculum ends the run here; also asked after the last step.

        `signals` are the measurements of the step before; those of an evaluation stand under `held_out/`.
        """

    def asks_evaluation(self, step: int) -> bool:
        """Whether the student must be measured on held-out prompts when `step` steps are done."""
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


class Curriculum(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "curriculum"

    @property
    def longest(self) -> int | None:
        """The largest budget of all steps, where the curriculum sets one."""
        return None

    @abstractmethod
    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context, student: Any) -> Schedule:
        """Make the schedule over a prompt set, for a built student."""
