"""An objective: one term of a step's loss, with its weight, its positions and its own denominator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from pydantic import Field

from opd.choice import Choice, kind_of
from opd.distributions import Distribution, Target
from opd.reduction import Reduction, position_weights
from opd.schedules import OverSteps
from opd.trajectories import AUTHORS, Author, Trajectories


@dataclass(frozen=True)
class Loss:
    """What an objective returns for one micro-batch.

    Attributes:
        total: scalar with a graph, `sum_n weights[n] * values[n]`.
        values: float32 `[N]`, detached: the objective (or its estimate) at each position before `weights`, in nats;
            zero where the weight is zero, since those positions are never computed.
        log_probs: float32 `[N]`, detached: the student's log-probability of each action taken; zero likewise.
        per_example: float32 `[B]` with a graph, each trajectory's part of `total`, when it was asked for.
        measured: float32 `[N]` by name, detached; their means over the positions that the objective counts are
            logged, NaN left out.
        computed: bool `[N]`, where the student was looked at; None where that is wherever the weight is not zero.
    """

    total: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor
    per_example: torch.Tensor | None = None
    measured: dict[str, torch.Tensor] = field(default_factory=dict)
    computed: torch.Tensor | None = None


class Writing(Protocol):
    """What an objective may ask of whoever writes the trajectories (`opd.rollouts.PrefixSource`)."""

    @property
    def authors(self) -> frozenset[Author]:
        """Who may have chosen an action."""

    @property
    def current(self) -> bool:
        """What the student writes, it writes now."""

    @property
    def exact(self) -> bool:
        """Actions are drawn from the student's whole distribution."""


class Objective(Choice):
    """Base of the axis. A recipe may list several; their losses are summed."""

    axis: ClassVar[str] = "objective"
    needs_teacher: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = False
    shaped: ClassVar[bool] = False
    """Whether the recipe's shaping, which compares student and teacher, weighs this objective's positions."""

    compares_group: ClassVar[bool] = False
    """Whether it compares the trajectories of one prompt, of which there must be two then."""

    weight: Annotated[float, OverSteps(ge=0)] = Field(1.0, description="Factor of this term")
    reduction: Reduction | None = Field(None, description="Mean over tokens or sequences; default the recipe's")
    written_by: list[Author] | None = Field(
        None,
        min_length=1,
        description="Only positions whose action one of these wrote: student, teacher, data, environment; default all",
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
    ) -> torch.Tensor:
        """float32 `[N]`: this objective's positions over its own global denominator, times its weight."""
        learn = trajectories.learn
        if self.written_by is not None:
            wanted = torch.tensor([AUTHORS.index(a) for a in self.written_by], device=learn.device)
            learn = learn & torch.isin(trajectories.authors.to(learn.device), wanted)
        if self.end == "mask":
            last = (trajectories.lengths.cumsum(0) - 1)[trajectories.finished]
            learn = learn.index_fill(0, last.to(learn.device), False)
        if self.truncated == "mask":
            learn = learn & trajectories.finished.repeat_interleave(trajectories.lengths).to(learn.device)
        return self.weight * position_weights(trajectories, self.reduction or reduction, sum_over_processes, learn)

    def shape(self, weights: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        """The weights with the recipe's shaping, where it concerns this objective."""
        return weights * shape if self.shaped else weights

    def heard(self, targets: Sequence[Target]) -> list[Target]:
        """The answers that this objective listens to."""
        return [t for t in targets if self.teacher is None or t.teacher == self.teacher]

    @abstractmethod
    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
    ) -> Loss:
        """The loss at the N positions of `trajectories`.

        Args:
            student: `[N]` distributions with a graph.
            targets: detached answers for the same positions; their divergences are summed with their weights.
            weights: float32 `[N]`, detached, the global denominator included.
        """

    def check_accepts(self, target: type[Distribution], source: str) -> None:
        """Raise `IncompatibleError` at start-up when this cannot be computed from what `source` answers."""

    def check_trajectories(self, rollout: Writing) -> None:
        """Raise `IncompatibleError` at start-up when it is not what it says on the states of this prefix source."""


SHARED = frozenset({"kind", "weight", "reduction", "written_by", "end", "truncated", "teacher"})
"""Settings that say where an objective counts, not what it is."""


def label(objective: Objective) -> str:
    """`kind(setting=value, ...)` with the settings that differ from the defaults."""
    data = objective.model_dump(exclude_defaults=True, exclude=set(SHARED))
    inside = ", ".join(f"{k}={v}" for k, v in data.items())
    kind = kind_of(objective)
    return f"{kind}({inside})" if inside else kind
