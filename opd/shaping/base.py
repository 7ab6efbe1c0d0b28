"""Shaping: how much each state counts, and by how much the teachers' word is moved there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch

from opd.choice import Choice
from opd.context import Context
from opd.distributions import Distribution, Target
from opd.errors import RunError
from opd.objectives.base import Writing
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.teachers import Answering

S = TypeVar("S", bound="Shaping")


@dataclass(frozen=True)
class Shape:
    """What a shaping says of N positions.

    Attributes:
        weights: float32 `[N]`, detached; 1 leaves a position as it is, 0 takes it out of the loss.
        offsets: float32 `[N]` in nats, detached: added to every teacher's log-probability of the action taken; None for
            none. Only a shaping with `makes_offsets` may make them.
        measured: float32 `[N]` by name, detached. The means over the positions that an objective counts, before
            `weights`, are logged as train/NAME, NaN left out; rollouts.jsonl has them by position.
    """

    weights: torch.Tensor
    offsets: torch.Tensor | None = None
    measured: dict[str, torch.Tensor] = field(default_factory=dict)

    def offset(self, targets: Sequence[Target]) -> list[Target]:
        """The teachers' answers with the offsets, which objectives on the action taken add."""
        return [replace(target, offset=self.offsets) for target in targets] if self.offsets is not None else [*targets]


class Shaper(ABC, Generic[S]):
    """A built shaping, of the settings `S`; with `state_dict` and `load_state_dict` what it keeps between steps is in
    checkpoints. The settings of a step, numbers in the places of schedules, come with each call."""

    def look(
        self,
        trajectories: Trajectories,
        targets: Sequence[Target],
        settings: S,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> Trajectories:
        """See a whole step once, before its micro-batches; what it keeps from step to step moves here.

        Args:
            trajectories: B of them, whole groups, with rewards where there are any.
            targets: every teacher's detached answer at the N positions.
            settings: the shaping's at this step.
            sum_over_processes: sums a tensor over the processes, of which each sees its own trajectories; all of them
                must call it equally often.

        Returns:
            The same trajectories. What was found by position stands in their `columns`, and so reaches the calls for
            micro-batches, which may hold parts of a group. Positions that it takes out of `learn` leave the objectives'
            denominators too.
        """
        return trajectories

    def own_signals(self) -> Mapping[str, float]:
        """What the last look found of the step as a whole, on all processes; logged as train/NAME."""
        return {}

    @abstractmethod
    def __call__(self, student: Distribution, targets: Sequence[Target], micro: Trajectories, settings: S) -> Shape:
        """The shape of one micro-batch. It may be asked for again, of smaller parts, where memory did not suffice.

        Args:
            student: `[N]` detached distributions.
            targets: every teacher's detached answer at the same positions.
            micro: whole trajectories, with the columns that `look` made.
            settings: the shaping's at this step.
        """


def looked(
    shapers: Sequence[Shaper],
    settings: Sequence[Shaping],
    trajectories: Trajectories,
    targets: Sequence[Target],
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
) -> Trajectories:
    """A step's trajectories after each shaper has looked, in order: it sees what those before it left."""
    for shaper, own in zip(shapers, settings, strict=True):
        trajectories = shaper.look(trajectories, targets, own, sum_over_processes)
    return trajectories


def words_of(settings: Sequence[Shaping], trajectories: Trajectories, values: Mapping[str, torch.Tensor]) -> list[str]:
    """What several shapings did to each of B trajectories, in words; empty where none of them has any.

    Args:
        settings: of the shapings.
        trajectories: B of them.
        values: float32 `[N]` by name, what was measured at each position.
    """
    columns = {name: column.cpu().split(trajectories.lengths.tolist()) for name, column in values.items()}
    told = []
    for i in range(len(trajectories)):
        means = {name: float(of_each[i].nanmean()) for name, of_each in columns.items()}
        known = {name: mean for name, mean in means.items() if mean == mean}
        said = [words for each in settings if (words := each.words(known, trajectories.reward(i)))]
        told.append("; ".join(said))
    return told


def joint_shape(
    shapers: Sequence[Shaper],
    settings: Sequence[Shaping],
    student: Distribution,
    targets: Sequence[Target],
    micro: Trajectories,
) -> Shape:
    """What several shapings say of one micro-batch together: weights are multiplied, offsets added. Each sees the
    teachers' answers as they were given.

    Raises:
        RunError: two of them measure something under one name.
    """
    shapes = [shaper(student, targets, micro, own) for shaper, own in zip(shapers, settings, strict=True)]
    weights, offsets, measured = shapes[0].weights, shapes[0].offsets, dict(shapes[0].measured)
    for shape in shapes[1:]:
        weights = weights * shape.weights
        if shape.offsets is not None:
            offsets = shape.offsets if offsets is None else offsets + shape.offsets
        if twice := sorted(measured.keys() & shape.measured.keys()):
            raise RunError(f"two shapings measure {twice[0]!r}; give what one of them measures another name")
        measured |= shape.measured
    return Shape(weights, offsets, measured)


class Shaping(Choice):
    """Base of the axis. A recipe may list several: see `joint_shape`."""

    axis: ClassVar[str] = "shaping"
    makes_offsets: ClassVar[bool] = False
    """Whether a shape may have offsets; objectives that cannot add them refuse such a shaping at the start."""

    measures: ClassVar[tuple[str, ...]] = ()
    """What it measures at each position under every setting, for curricula that read it."""

    needs_reward: ClassVar[bool] = False
    """Whether it goes by verdicts, which a verifier or the rollout must give then."""

    alone: ClassVar[bool] = False
    """Whether a trajectory's weights depend on that trajectory alone, whatever else is in the step or was in others."""

    corrects: ClassVar[bool] = False
    """Whether its weights make up for samples of a student that is a little older than the one that learns."""

    unweighed: ClassVar[str] = "leave it out"
    """What a recipe can say instead where it `weighs` and no objective takes weights, for the error that says so."""

    def words(self, measured: Mapping[str, float], reward: float | None) -> str | None:
        """What it did to one trajectory and why, for a reader of the report; None where there is nothing to say.

        Args:
            measured: by name the mean over the trajectory's positions of what shapings measured there, of `weight` and
                of `offset`; what is NaN everywhere is left out.
            reward: the verdict on it, None where there is none.
        """
        return None

    @property
    def weighs(self) -> bool:
        """Whether its weights may differ from 1, so that some objective has to take them (`Objective.shaped`)."""
        return not self.makes_offsets

    @property
    def compares_group(self) -> bool:
        """Whether it compares the trajectories of one prompt, of which there must be two then."""
        return False

    @property
    def narrows(self) -> bool:
        """Whether it takes positions out of `Trajectories.learn`, where then nothing is measured."""
        return False

    def check_trajectories(self, rollout: Writing, exact: bool) -> None:
        """Raise `IncompatibleError` at start-up when it cannot be found from what this source writes; `exact`: at every
        step actions are drawn from the student's whole distribution."""

    def check_teachers(self, teachers: Sequence[Answering]) -> None:
        """Raise `IncompatibleError` at start-up when it cannot be found from what these teachers answer."""

    @abstractmethod
    def build(self, context: Context) -> Shaper:
        """Make what shapes the positions of a run."""
