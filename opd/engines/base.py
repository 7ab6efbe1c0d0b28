"""Engines: who draws the student's completions in the place of the rollout, from weights that follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from opd.choice import Choice
from opd.context import Context
from opd.errors import RunError
from opd.language.engines.base import Drawing, EncodedPrompt, Ended, Engine, Looker, Row
from opd.planning import Shape
from opd.prompts import Prompt

NONE_TRAINED = (
    "the checkpoint holds a drafter that was trained beside the student, and rollout.engine trains none; set "
    "rollout.engine.train as it was"
)


@dataclass(frozen=True)
class Pending:
    """What a writer is asked for, as `Engine.sample` is."""

    contexts: Sequence[EncodedPrompt]
    group: int
    budget: int
    seeds: Sequence[int]
    drawing: Drawing
    ended: Ended | None = None


class Writer(ABC):
    """A built engine. It draws from the student's weights, or holds a copy of them somewhere and brings it up to date.

    Attributes:
        dtype: what the weights that write are taken to compute in, as far as rounding goes.
        stale: steps by which its weights may lie behind the student's.
        ahead: whether it can write what it is told to `begin` while the process trains.
        notes: what a person should know.
    """

    dtype: torch.dtype = torch.bfloat16
    stale: int = 0
    ahead: bool = False
    notes: Sequence[str] = ()

    @abstractmethod
    def sample(
        self,
        contexts: Sequence[EncodedPrompt],
        group: int,
        budget: int,
        seeds: Sequence[int],
        drawing: Drawing,
        looker: Looker | None = None,
        ended: Ended | None = None,
    ) -> list[Row]:
        """As `Engine.sample`, from the student's weights as they are now, or where that was begun before from those of
        then. Rows that could not be written are `lost`. All processes call.

        Raises:
            RunError: the weights that wrote are not those that were sent.
        """

    def begin(self, asked: Pending) -> None:
        """Start on that, from the weights as they are now; `sample` of the same then waits for it. All processes call.
        Only who is `ahead` is asked to, and has it."""
        raise TypeError(f"{type(self).__name__} says that it writes ahead, and has no begin()")

    def learn(self, settings: RolloutEngine, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:  # noqa: B027
        """Learn from what was written for this step, under the engine's `settings` of now, before the student moves.
        All processes call."""

    def state_dict(self) -> dict[str, Any]:
        """All of its own that the next step depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        if state:
            raise RunError(NONE_TRAINED)

    def beside(self) -> Mapping[str, Callable[[Path], None]]:
        """What it trained beside the student: what writes each to a folder, by the folder's name in the run."""
        return {}

    @abstractmethod
    def check_teachers(self, teachers: Sequence[Choice]) -> None:
        """Raise `IncompatibleError` where the weights that it sends would reach one of these teachers (settings)."""

    @abstractmethod
    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        """Raise `ModelError` where a prompt with a completion of `budget` is more than this can write."""

    @abstractmethod
    def failures(self) -> Mapping[str, int]:
        """How often rows were lost, by reason."""

    @abstractmethod
    def own_signals(self) -> Mapping[str, float]:
        """What it measured since it was last asked; logged as train/NAME."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind; it may be called twice."""


class RolloutEngine(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "engine"
    here: ClassVar[bool] = False
    """Whether it draws in this process, from the model that the rollout would draw from: then `rollout.batch` and
    `rollout.dtype` are kept to."""

    watched: ClassVar[bool] = True
    """Whether somebody may look at the rows while they are written."""

    @property
    def behind(self) -> int:
        """Steps by which the weights that write may lie behind those that learn."""
        return 0

    @abstractmethod
    def told(self, student: Shape) -> str:
        """What a plan says of it, in a line."""

    @abstractmethod
    def build(self, language: Engine, context: Context) -> Writer:
        """Make the writer for a student, or where it draws `here` for the copy that samples in its place."""
