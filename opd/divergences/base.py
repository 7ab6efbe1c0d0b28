"""A divergence compares teacher and student state by state and says which way the student should move."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from opd.choice import kind_of
from opd.distributions import Categorical, Distribution, Target
from opd.errors import IncompatibleError
from opd.objectives.base import Objective
from opd.operator import Chunk, Compared, Loss, Whole, divergence_loss
from opd.scenes import Scene, SequenceScene
from opd.trajectories import Trajectories

LEFT_BY_SUMS = 32 * torch.finfo(torch.float32).eps
"""Nats by which a divergence or log-ratio of two equal distributions may differ from zero, summed in float32."""


class Divergence(Objective):
    """Base of the axis."""

    axis: ClassVar[str] = "divergence"
    called: ClassVar[str] = "divergence"
    needs_teacher: ClassVar[bool] = True
    shaped: ClassVar[bool] = True
    accepts: ClassVar[tuple[str, ...]] = ()
    """Kinds of teacher distribution that this divergence can be computed from."""

    alternative: ClassVar[str] = ""
    """What to do when the teacher answers another kind."""

    scene: ClassVar[type[Scene]]
    """What the table of objectives measures this choice in."""

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

    modality: ClassVar[str | tuple[str, ...] | None] = ("language", "action")
    scene: ClassVar[type[Scene]] = SequenceScene
    buffers: ClassVar[int] = 1
    """How many scratch tensors `[C, S]` its chunks need; the first is there anyway."""

    @property
    def sequence_level(self) -> bool:
        """Whether the promise is about whole sequences, `sum_y q(y) exact(y)`, instead of each state visited."""
        return False

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        assert isinstance(student, Categorical)
        actions, lengths = trajectories.actions, trajectories.lengths
        found = [self.concerned(target.distribution) for target in targets]
        places = [where for where in found if where is not None]
        if places and len(places) == len(found):
            # Where no teacher says anything, nothing is projected.
            weights = weights * torch.stack(places).any(0)
        loss = divergence_loss(self, student, targets, weights, actions, lengths, per_example=per_example)
        return replace(loss, computed=weights != 0) if places else loss

    def concerned(self, answer: Distribution) -> torch.Tensor | None:
        """bool `[N]`: the positions at which an answer says what this compares; None for all of them."""
        return None

    @abstractmethod
    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        """The function that compares a chunk of positions, as the operator asks for it; see `opd.operator`."""

    @abstractmethod
    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """The divergence that is promised, as the textbook writes it: `[..., S]` log-probabilities to `[...]` nats.

        Differentiable in `log_q` by autograd and indifferent to memory: for tests and for the table of objectives.
        """
