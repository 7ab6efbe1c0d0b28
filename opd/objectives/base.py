"""An objective: one term of a step's loss, with its weight, its positions and its own denominator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from pydantic import Field

from opd.choice import Choice, kind_of
from opd.distributions import Distribution, Target
from opd.errors import IncompatibleError
from opd.operator import Loss
from opd.reduction import Reduction, position_weights
from opd.schedules import OverSteps
from opd.trajectories import AUTHORS, Author, Trajectories


class Writing(Protocol):
    """What an objective may ask of whoever writes the trajectories (`opd.rollouts.PrefixSource`)."""

    @property
    def learners(self) -> frozenset[Author]:
        """The authors whose positions can be learnt from."""

    @property
    def current(self) -> bool:
        """What the student writes, it writes now."""

    @property
    def draws(self) -> bool:
        """What the student writes is drawn from its distribution, and is neither its likeliest nor drawn at another
        temperature."""

    @property
    def drafts(self) -> bool:
        """Its positions are the slots of blocks that a drafter proposed."""

    @property
    def stale(self) -> int:
        """Steps by which the weights that it writes with may lie behind those that learn, uncorrected."""


class Objective(Choice):
    """Base of the axis. A recipe may list several; their losses are summed."""

    axis: ClassVar[str] = "objective"
    needs_teacher: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = False
    shaped: ClassVar[bool] = False
    """Whether the recipe's shaping, which compares student and teacher, weighs this objective's positions."""

    called: ClassVar[str] = "objective"
    """What its value is, where a person reads it beside others; in metrics.jsonl the first objective's is always
    `train/divergence`."""

    same_teacher: ClassVar[bool] = False
    """Whether it is what it claims only under the teacher whose texts the student was fine-tuned on."""

    takes_offsets: ClassVar[bool] = False
    """Whether it adds `Target.offset`, what a shaping moves a teacher's log-probability of the action taken by."""

    compares_group: ClassVar[bool] = False
    """Whether it compares the trajectories of one prompt, of which there must be two then."""

    alone: ClassVar[bool] = False
    """Whether a trajectory's part of the loss depends on that trajectory alone, whatever else is in the step: what an
    update that bounds each one's part counts on."""

    weight: Annotated[float, OverSteps(ge=0)] = Field(1.0, description="Factor of this term")
    reduction: Reduction | None = Field(None, description="Mean over tokens or sequences; default the recipe's")
    written_by: list[Literal["student", "teacher", "data"]] | None = Field(
        None,
        min_length=1,
        description="Only positions whose action one of these wrote: student, teacher, data; default all of them",
    )
    end: Literal["learn", "mask"] = Field("learn", description="Whether the end token's position counts")
    truncated: Literal["learn", "mask"] = Field(
        "learn", description="Whether trajectories count that the budget cut before they ended"
    )
    teacher: str | None = Field(None, description="Name of the one teacher that this objective listens to; default all")

    def position_weights(
        self,
        trajectories: Trajectories,
        reduction: Reduction,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
        expected: int | None = None,
    ) -> torch.Tensor:
        """float32 `[N]`: this objective's positions over its own global denominator, times its weight; the denominator
        is `expected` trajectories where that is given."""
        learn = trajectories.learnt
        if self.written_by is not None:
            wanted = torch.tensor([AUTHORS.index(a) for a in self.written_by], device=learn.device)
            learn = learn & torch.isin(trajectories.authors.to(learn.device), wanted)
        if self.end == "mask":
            last = (trajectories.lengths.cumsum(0) - 1)[trajectories.finished]
            learn = learn.index_fill(0, last.to(learn.device), False)
        if self.truncated == "mask":
            learn = learn & trajectories.finished.repeat_interleave(trajectories.lengths).to(learn.device)
        weights = position_weights(trajectories, self.reduction or reduction, sum_over_processes, learn, expected)
        return self.weight * weights

    def shape(self, weights: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        """The weights with the recipe's shaping, where it concerns this objective."""
        return weights * shape if self.shaped else weights

    def heard(self, targets: Sequence[Target]) -> list[Target]:
        """The answers that this objective listens to.

        Raises:
            IncompatibleError: they have offsets, which this objective cannot add.
        """
        if not self.takes_offsets and any(target.offset is not None for target in targets):
            raise IncompatibleError(
                f"objective {self.model_dump()['kind']!r} has no place for the offsets that the shaping made; one "
                "that makes them says so in makes_offsets"
            )
        return [t for t in targets if self.teacher is None or t.teacher == self.teacher]

    @abstractmethod
    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        """The loss at the N positions of `trajectories`.

        Args:
            student: `[N]` distributions with a graph.
            targets: detached answers for the same positions; their divergences are summed with their weights.
            weights: float32 `[N]`, detached, the global denominator included.
            per_example: whether `Loss.per_example` is wanted.
        """

    def check_accepts(self, target: type[Distribution], source: str) -> None:
        """Raise `IncompatibleError` at start-up when this cannot be computed from what `source` answers."""

    def check_ids(self, count: int) -> None:
        """Raise `IncompatibleError` at start-up when it looks at more ids of a state than the `count` that student and
        teachers have in common."""

    def check_authors(self, authors: Collection[Author]) -> None:
        """Raise `IncompatibleError` at start-up when `written_by` names somebody who is not among the `authors` of the
        rollout."""
        absent = next((name for name in self.written_by or () if name not in authors), None)
        if absent is not None:
            known = " and ".join(name for name in AUTHORS if name in authors)
            raise IncompatibleError(
                f"objective {kind_of(self)!r}: written_by names {absent!r}, who writes nothing in this rollout, "
                f"written by {known}: name those, or take another rollout"
            )

    def check_trajectories(self, rollout: Writing) -> None:
        """Raise `IncompatibleError` at start-up when it is not what it says on what this source writes."""


def check_draws(objective: Objective, rollout: Writing) -> None:
    """Raise `IncompatibleError` where an objective that takes actions for draws of the student gets others."""
    if not rollout.draws:
        raise IncompatibleError(
            f"objective {kind_of(objective)!r} takes the student's actions for draws from its distribution, and this "
            "rollout's are a drafter's likeliest tokens, or are drawn at another temperature than the recipe's: take "
            "accepted and rejected, which compare whole distributions, or rollout.proposing: drawn with "
            "rollout.text_temperature equal to temperature"
        )


SHARED = frozenset({"kind", "weight", "reduction", "written_by", "end", "truncated", "teacher"})
"""Settings that say where an objective counts, not what it is."""


def label(objective: Objective) -> str:
    """`kind(setting=value, ...)` with the settings that differ from the defaults."""
    data = objective.model_dump(exclude_defaults=True, exclude=set(SHARED))
    inside = ", ".join(f"{k}={v}" for k, v in data.items())
    kind = kind_of(objective)
    return f"{kind}({inside})" if inside else kind
