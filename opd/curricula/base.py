"""Curricula: which prompts come next, and how far they may be extended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from opd.choice import Choice
from opd.context import Context
from opd.distributions import Target
from opd.prompts import Prompt
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.rollouts import Rollout

Gather = Callable[[Trajectories, torch.Tensor], torch.Tensor]
"""Trajectories of this process and `[B, ...]` numbers of theirs to those of all processes: see `Asker.gather`."""


@dataclass(frozen=True)
class Draw:
    """One step's prompts (any number; none is a step too, in which nothing is rolled out), the budget of actions for
    each of their trajectories (None is the rollout's own), and what the curriculum wants logged."""

    prompts: list[Prompt]
    budget: int | None = None
    signals: dict[str, float] = field(default_factory=dict)


class Asker(ABC):
    """What a course may ask of the run when the next draw is wanted: scores of student and teachers, and that the
    student's weights be kept or restored. Tokens and seconds are counted to the step whose draw it is.

    With several processes each of them works on its share of the prompts; a course that decides by what came of it
    gathers it first, so that all of them draw the same.
    """

    @abstractmethod
    def roll_out(
        self, prompts: Sequence[Prompt], group: int = 1, budget: int | None = None, by: Rollout | None = None
    ) -> Trajectories:
        """`group` trajectories of each of this process's share of `prompts`, with rewards where verdicts exist.

        The student is sampled as on held-out prompts. The same prompts asked for twice at one step give the same draws;
        no draw is that of training or of an evaluation.

        Args:
            prompts: of all processes; the same on each.
            group: trajectories of each prompt.
            budget: most actions of a trajectory; default the rollout's.
            by: who writes instead (`TeacherRollout()`, for what the teacher itself would answer).

        Raises:
            RunError: fewer prompts than processes.
        """

    @abstractmethod
    def ask(self, trajectories: Trajectories) -> list[Target]:
        """Every teacher's answer at each position of `trajectories`."""

    @abstractmethod
    def log_probs(self, trajectories: Trajectories) -> torch.Tensor:
        """float32 `[N]`, detached: the student's log-probability of each action, whoever wrote it."""

    @abstractmethod
    def gather(self, trajectories: Trajectories, numbers: torch.Tensor) -> torch.Tensor:
        """What all processes found, on each of them: `[B, ...]` numbers of this process's `trajectories` to those of
        all, on the CPU, in the order of the prompts that were asked for."""

    @abstractmethod
    def working(self, text: str) -> AbstractContextManager[None]:
        """Tell a person what takes a while, as long as it lasts."""

    @abstractmethod
    def stop_requested(self) -> bool:
        """Whether somebody asked the run to stop; the same answer on all processes, which must all ask. A course that
        takes long then saves what it has and ends the run, which goes on from there."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint of the run as it is, between two steps, with what the course found so far in it; nothing
        where the recipe wants none."""

    @abstractmethod
    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to `curriculum.jsonl` of the run, one a prompt, for the report."""

    @abstractmethod
    def keep_weights(self) -> None:
        """Keep the weights that training moves as they are now, in place of those kept before."""

    @abstractmethod
    def restore_weights(self) -> bool:
        """Give the student the weights that were kept last; False when none were. Optimiser state stays."""


class MustAskError(Exception):
    """A draw that cannot be said without asking the run something."""


class NobodyToAsk(Asker):
    """For a course that is asked what it would draw while the run does something else.

    Raises:
        MustAskError: by whatever is asked.
    """

    def roll_out(
        self, prompts: Sequence[Prompt], group: int = 1, budget: int | None = None, by: Rollout | None = None
    ) -> Trajectories:
        raise MustAskError

    def ask(self, trajectories: Trajectories) -> list[Target]:
        raise MustAskError

    def log_probs(self, trajectories: Trajectories) -> torch.Tensor:
        raise MustAskError

    def gather(self, trajectories: Trajectories, numbers: torch.Tensor) -> torch.Tensor:
        raise MustAskError

    def working(self, text: str) -> AbstractContextManager[None]:
        raise MustAskError

    def stop_requested(self) -> bool:
        raise MustAskError

    def save(self) -> None:
        raise MustAskError

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        raise MustAskError

    def keep_weights(self) -> None:
        raise MustAskError

    def restore_weights(self) -> bool:
        raise MustAskError


class Foreseen(dict[str, float]):
    """Measurements of a step that is not over: what is not among them may be when it is.

    Raises:
        MustAskError: by reading such a one.
    """

    def __missing__(self, name: str) -> float:
        raise MustAskError(name)


class Course(ABC):
    """A built curriculum; everything that it remembers is in `state_dict`."""

    @abstractmethod
    def next(self, step: int, signals: Mapping[str, float], asker: Asker) -> Draw | None:
        """The draw of `step` (from 0), or None when the curriculum ends the run here; also asked after the last step.

        `signals` are the measurements of the step before; those of an evaluation stand under `held_out/`.
        """

    def saw(
        self,
        trajectories: Trajectories,
        values: Mapping[str, torch.Tensor],
        signals: Mapping[str, float],
        gather: Gather,
    ) -> Mapping[str, float]:
        """Told after each step that rolled out what came of it.

        Args:
            trajectories: this process's, with rewards and with the columns that a shaping made.
            values: float32 `[N]` by name: `divergence`, `weight` and what a shaping measured at each position.
            signals: the step's measurements over all processes.
            gather: brings numbers by trajectory together from all processes.

        Returns:
            What it wants logged of the step.
        """
        return {}

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
    reads: ClassVar[tuple[str, ...]] = ()
    """What it needs measured at each position; a recipe whose shaping does not measure it is refused."""

    independent: ClassVar[bool] = False
    """Whether each prompt is in a draw by itself, with probability `batch.prompts / prompts`, whatever else is drawn:
    what privacy amplification by sampling counts on."""

    needs_reward: ClassVar[bool] = False
    """Whether it goes by verdicts, which a verifier or the rollout must give then."""

    @property
    def known(self) -> bool:
        """Whether who reads the recipe can tell which prompts each step draws; asked of those that are
        `independent`."""
        return False

    @property
    def longest(self) -> int | None:
        """The largest budget of all steps, where the curriculum sets one."""
        return None

    @property
    def rollouts(self) -> list[Rollout]:
        """Who writes what it asks for, where that is others than who writes in training."""
        return []

    @abstractmethod
    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context) -> Course:
        """Make the course over a prompt set; `per_step` is the recipe's `batch.prompts`."""
