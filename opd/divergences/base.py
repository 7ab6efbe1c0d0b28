"""A divergence compares teacher and student state by state and says which way the student should move."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch

from opd.choice import Choice
from opd.distributions import Distribution
from opd.errors import IncompatibleError


class Divergence(Choice):
    """Base of the axis. Final subclasses derive from `OnSupport` or `OnAction`."""

    axis: ClassVar[str] = "divergence"
    accepts: ClassVar[tuple[str, ...]] = ()
    alternative: ClassVar[str] = ""
    descends: ClassVar[str] = ""

    def check_accepts(self, target: type[Distribution], source: str) -> None:
        """Raise `IncompatibleError` at start-up when this divergence cannot be computed from what `source` answers."""
        if target.kind not in self.accepts:
            raise IncompatibleError(
                f"divergence {self.model_dump()['kind']!r} needs a teacher that answers {' or '.join(self.accepts)}, "
                f"and {source} answers {target.kind!r}: {self.alternative}"
            )


class OnSupport(Divergence):
    """Divergences of two whole distributions: over the vocabulary, or over K ids and a tail bucket."""

    accepts: ClassVar[tuple[str, ...]] = ("categorical", "top_k")
    alternative: ClassVar[str] = "use reverse_kl_sampled, or ask the teacher for its top log-probabilities"
    top_k: int | None = None
    """Compare over the teacher's K most likely ids and a tail bucket instead of the whole vocabulary."""

    support_from: Literal["teacher", "student"] = "teacher"
    """Whose top K make the support when `top_k` is set."""

    @abstractmethod
    def value_and_grad(
        self, log_p: torch.Tensor, log_q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence and its gradient in the student's logits.

        Args:
            log_p: float32 `[C, S]`, the teacher's normalised log-probabilities on a support of S ids. May be overwritten.
            log_q: float32 `[C, S]`, the student's. May be overwritten.

        Returns:
            `[C]` values in nats and `[C, S]` gradients with respect to logits whose softmax is `exp(log_q)`.
        """


class OnAction(Divergence):
    """Estimators that see only the action taken: policy gradients whose reward is a log-ratio."""

    accepts: ClassVar[tuple[str, ...]] = ("categorical", "sampled")
    alternative: ClassVar[str] = "ask the teacher for the log-probability of given tokens"
    discount: float = 0.0

    @abstractmethod
    def value_and_coefficient(
        self, log_p: torch.Tensor, log_q: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimate and the factor on `grad log q(action)`.

        Args:
            log_p: float32 `[N]`, the teacher's log-probability of each action taken; detached.
            log_q: float32 `[N]`, the student's; detached.
            lengths: int64 `[B]`, positions of each trajectory, summing to N.

        Returns:
            `[N]` values in nats and `[N]` coefficients: the position's gradient is `coefficient * grad log q(action)`.
        """
