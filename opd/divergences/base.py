"""A divergence compares teacher and student state by state and says which way the student should move."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from opd.choice import Choice
from opd.distributions import Distribution
from opd.errors import IncompatibleError
from opd.trajectories import Trajectories


@dataclass(frozen=True)
class Target:
    """One teacher's answer for N positions and its weight, a number or `[N]`. A loss sums over several."""

    distribution: Distribution
    weight: float | torch.Tensor = 1.0

    def select(self, index: slice | torch.Tensor) -> Target:
        weight = self.weight[index] if isinstance(self.weight, torch.Tensor) else self.weight
        return Target(self.distribution.select(index), weight)


@dataclass(frozen=True)
class Loss:
    """What a divergence returns for one micro-batch.

    Attributes:
        total: scalar with a graph, `sum_n weights[n] * values[n]`.
        values: float32 `[N]`, detached: the divergence (or its estimate) at each position before `weights`, in nats;
            zero where the weight is zero, since those positions are never computed.
        log_probs: float32 `[N]`, detached: the student's log-probability of each action taken; zero likewise.
        per_example: float32 `[B]` with a graph, each trajectory's part of `total`, when it was asked for.
    """

    total: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor
    per_example: torch.Tensor | None = None


class Divergence(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "divergence"
    accepts: ClassVar[tuple[str, ...]] = ()
    """Kinds of teacher distribution that this divergence can be computed from."""

    alternative: ClassVar[str] = ""
    """What to do when the teacher answers another kind."""

    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Settings under which the table of objectives measures this choice."""

    @property
    def descends(self) -> str:
        """Name of the exact divergence whose gradient this objective has in expectation on the student's own states."""
        return str(self.model_dump()["kind"])

    @property
    def unbiased(self) -> bool:
        """Whether that expectation holds exactly with these settings."""
        return True

    @property
    def sequence_level(self) -> bool:
        """Whether the promise is about whole sequences, `sum_y q(y) exact(y)`, instead of each state visited."""
        return False

    @abstractmethod
    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """The divergence that is promised, as the textbook writes it: `[..., S]` log-probabilities to `[...]` nats.

        Differentiable in `log_q` by autograd and indifferent to memory: for tests and for the table of objectives.
        """

    @abstractmethod
    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
    ) -> Loss:
        """Compare at the N positions of `trajectories`.

        Args:
            student: `[N]` distributions with a graph.
            targets: detached answers for the same positions; their divergences are summed with their weights.
            weights: float32 `[N]`, detached, the global denominator included.
        """

    def check_accepts(self, target: type[Distribution], source: str) -> None:
        """Raise `IncompatibleError` at start-up when this divergence cannot be computed from what `source` answers."""
        if target.kind not in self.accepts:
            raise IncompatibleError(
                f"divergence {self.model_dump()['kind']!r} needs a teacher that answers {' or '.join(self.accepts)}, "
                f"and {source} answers {target.kind!r}: {self.alternative}"
            )
