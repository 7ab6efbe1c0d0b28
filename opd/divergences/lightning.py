"""Lightning OPD: regression of the sampled tokens' log-probabilities on the teacher's, on trajectories of any day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.distributions import Distribution, Sampled, Target, spans_in
from opd.divergences.on_action import OnAction
from opd.errors import IncompatibleError
from opd.objectives.base import Writing, check_draws
from opd.operator import Loss
from opd.schedules import OverSteps
from opd.trajectories import Trajectories


class Lightning(OnAction):
    """`0.5 A_t^2` with `A_t = log p(a_t) - log q(a_t)`, linear beyond `clamp`; its gradient in `q` is
    `-sg(clamp(A_t)) grad log q(a_t)`, the update of Lightning OPD (Wu, Han and Cai 2026, arXiv 2604.13010).

    It is what it says on trajectories that any earlier student wrote: least squares on the tokens that stand there. On
    tokens that the student draws now, its expected gradient is that of reverse KL (the k2 identity), and then it is the
    paper's online arm. A position is credited with its own token alone. Logged: `advantage`, the mean of `A_t`;
    `advantage_size`, of its absolute value; `clamped`, the share of tokens beyond the bound.
    """

    kind: Literal["lightning"] = "lightning"
    same_teacher: ClassVar[bool] = True
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"clamp": None}, {"clamp": 1.0})
    clamp: Annotated[float, OverSteps(gt=0)] | None = Field(
        10.0, description="Bound on the advantage in nats; null for none"
    )

    @property
    def descends(self) -> str:
        return "reverse_kl on own samples; squared log-ratio on stored ones"

    @property
    def unbiased(self) -> bool:
        return self.clamp is None

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def value_and_coefficient(
        self, log_p: torch.Tensor, log_q: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        advantage = log_p - log_q
        bounded = advantage if self.clamp is None else advantage.clamp(-self.clamp, self.clamp)
        # Half the square inside the bound, the tangent there outside: the integral of the coefficient.
        return bounded * (advantage - 0.5 * bounded), -bounded

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        # The taken tokens' log-probabilities are wanted twice, for the loss and for the log.
        with torch.no_grad():
            known = [
                t
                if spans_in(t.distribution) is not None
                else replace(t, distribution=Sampled.of(t.distribution, trajectories.actions))
                for t in targets
            ]
        loss = super().__call__(student, known, weights, trajectories, per_example)
        live = weights != 0
        measured = {name: torch.zeros_like(loss.values) for name in ("advantage", "advantage_size", "clamped")}
        for target in known:
            log_p, log_q = _of_actions(target, loss.log_probs)
            log_p = log_p if target.offset is None else log_p + target.offset
            advantage = (log_p - log_q).where(live, 0.0) / len(known)
            measured["advantage"] += advantage
            measured["advantage_size"] += advantage.abs()
            if self.clamp is not None:
                measured["clamped"] += (advantage.abs() * len(known) > self.clamp).float() / len(known)
        return replace(loss, measured=measured)

    def check_trajectories(self, rollout: Writing) -> None:
        check_draws(self, rollout)
        if rollout.learners != {"student"}:
            raise IncompatibleError(
                "objective 'lightning' learns from what the student wrote, now or earlier: take rollout: stored with a "
                "store that opd rollout sampled from the student, or rollout: student"
            )


def _of_actions(target: Target, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 `[N]` each, teacher's and student's, of the actions taken: of a span's positions those of the span."""
    spans = spans_in(target.distribution)
    if spans is None:
        assert isinstance(target.distribution, Sampled)
        return target.distribution.log_probs, log_q
    owners = spans.owners()[spans.compared]
    each = torch.zeros(2, len(log_q), device=log_q.device)
    each[:, spans.compared] = torch.stack([spans.sums(spans.log_probs.to(log_q)), spans.sums(log_q)])[:, owners]
    return each[0], each[1]
