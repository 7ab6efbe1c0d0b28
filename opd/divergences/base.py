"""A divergence compares teacher and student state by state and says which way the student should move."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from opd.choice import kind_of
from opd.distributions import Distribution
from opd.errors import IncompatibleError
from opd.objectives.base import Objective


class Divergence(Objective):
    """Base of the axis."""

    axis: ClassVar[str] = "divergence"
    needs_teacher: ClassVar[bool] = True
    shaped: ClassVar[bool] = True
    accepts: ClassVar[tuple[str, ...]] = ()
    """Kinds of teacher distribution that this divergence can be computed from."""

    alternative: ClassVar[str] = ""
    """What to do when the teacher answers another kind."""

    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Settings under which the table of objectives measures this choice."""

    @property
    def descends(self) -> str:
        """Name of the exact divergence whose gradient this objective has in expectation on the student's own states."""
        return kind_of(self)

    @property
    def unbiased(self) -> bool:
        """Whether that expectation holds exactly with these settings."""
        return True

    def check_accepts(self, target: type[Distribution], source: str) -> None:
        """Raise `IncompatibleError` at start-up when this divergence cannot be computed from what `source` answers."""
        if target.kind not in self.accepts:
            raise IncompatibleError(
                f"objective {self.model_dump()['kind']!r} needs a teacher that answers {' or '.join(self.accepts)}, "
                f"and {source} answers {target.kind!r}: {self.alternative}"
            )


class CategoricalDivergence(Divergence):
    """Of distributions over ids."""

    modality: ClassVar[str | None] = "language"

    @property
    def sequence_level(self) -> bool:
        """Whether the promise is about whole sequences, `sum_y q(y) exact(y)`, instead of each state visited."""
        return False

    @abstractmethod
    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """The divergence that is promised, as the textbook writes it: `[..., S]` log-probabilities to `[...]` nats.

        Differentiable in `log_q` by autograd and indifferent to memory: for tests and for the table of objectives.
        """
