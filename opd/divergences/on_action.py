"""Base of estimators that see only the action taken."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from opd.divergences.base import LEFT_BY_SUMS, CategoricalDivergence
from opd.errors import IncompatibleError
from opd.objectives.base import Writing, check_draws
from opd.operator import Chunk, Compared, Whole, along_actions


class OnAction(CategoricalDivergence):
    """Estimators that see only the action taken: policy gradients whose reward is a log-ratio."""

    accepts: ClassVar[tuple[str, ...]] = ("categorical", "sampled")
    takes_offsets: ClassVar[bool] = True
    alternative: ClassVar[str] = "ask the teacher for the log-probability of given tokens"

    @property
    def sees_whole_trajectories(self) -> bool:
        """Whether a position is credited with what follows it, so that `lengths` are needed and not just one chunk."""
        return False

    @abstractmethod
    def value_and_coefficient(
        self, log_p: torch.Tensor, log_q: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimate and the factor on `grad log q(action)`.

        Args:
            log_p: float32 `[N]`, the teacher's log-probability of each action taken, with a shaping's offset; detached.
            log_q: float32 `[N]`, the student's; detached.
            lengths: int64 `[B]`, positions of each trajectory, summing to N.

        Returns:
            `[N]` values in nats and `[N]` coefficients: the position's gradient is `coefficient * grad log q(action)`.
        """

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        if not self.sees_whole_trajectories:
            return self._compare
        found = self._sum_targets(whole, whole.lengths)
        return lambda chunk: along_actions(chunk, *(each[chunk.index] for each in found))

    def _compare(self, chunk: Chunk) -> Compared:
        return along_actions(chunk, *self._sum_targets(chunk, torch.ones(len(chunk.index)).long()))

    def _sum_targets(
        self, here: Chunk | Whole, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values and coefficients of the estimate for each teacher, summed with the teachers' weights, and gaps: half
        the square of a log-ratio is its size as a KL."""
        taken = here.taken()
        value, coefficient, gap = torch.zeros(3, len(taken), device=taken.device)
        for target in here.targets:
            log_p = here.answered(target)
            v, c = self.value_and_coefficient(log_p, taken, lengths)
            value += v * target.weight
            coefficient += c * target.weight
            counts = torch.as_tensor(target.weight, device=taken.device) != 0
            ratio = ((log_p - taken).abs() - LEFT_BY_SUMS).clamp_(min=0)
            gap = torch.maximum(gap, 0.5 * ratio.square() * counts)
        return value, coefficient, gap

    def check_trajectories(self, rollout: Writing) -> None:
        check_draws(self, rollout)
        if rollout.stale:
            raise IncompatibleError(
                f"objective {self.model_dump()['kind']!r} needs samples of the student as it is, and "
                "rollout.engine.overlap draws them from weights one step old: add shaping truncated_importance, take "
                "reverse_kl, which compares whole distributions, or leave overlap out"
            )
        if rollout.learners != {"student"} or not rollout.current:
            kind = self.model_dump()["kind"]
            raise IncompatibleError(
                f"objective {kind!r} needs the student's own samples: on others its expectation is not what it says. "
                "Take rollout: student, or reverse_kl, which compares whole distributions, or on stored ones lightning"
            )
