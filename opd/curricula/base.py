"""Curricula: which prompts come next, and how far they may be extended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from opd.choice import Choice
from opd.prompts import Prompt


@dataclass(frozen=True)
class Draw:
    """One step's prompts and the budget of actions for each of their trajectories."""

    prompts: list[Prompt]
    budget: int


class Schedule(ABC):
    """A built curriculum; everything that it remembers is in `state_dict`."""

    @abstractmethod
    def next(self, step: int, signals: Mapping[str, float]) -> Draw:
        """The draw of `step` (from 0); `signals` are the measurements of the step before."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


class Curriculum(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "curriculum"

    @abstractmethod
    def build(self, prompts: Sequence[Prompt], per_step: int, budget: int, seed: int) -> Schedule:
        """Make the schedule over a prompt set; `budget` is the rollout's own limit."""
