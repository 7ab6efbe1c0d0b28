"""Comparisons that see the action taken alone: policy gradients, and imitation of what stands there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from opd.distributions import Categorical, Distribution, Gaussian
from opd.operator.chunks import Chunk, Compared, Whole
from opd.operator.gradient import divergence_loss
from opd.operator.loss import Loss
from opd.reduction import sums_by_trajectory

ActionRule = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`(log_q [C], index [C]) -> (values [C], coefficients [C])`: the student's log-probabilities of the actions taken at
the positions `index`, detached; a position's gradient is `coefficient * grad log q(action)`."""


def along_actions(
    chunk: Chunk, values: torch.Tensor, coefficients: torch.Tensor, gap: torch.Tensor | None = None
) -> Compared:
    """`values` `[C]` with the gradient `coefficients` `[C]` times that of the log-probability of the action taken; the
    chunk's `log_q` is written over. `gap` `[C]` as in `Compared`."""
    # d log q(a) / d logits = onehot(a) - q
    grad = chunk.log_q.exp_().mul_(-coefficients[:, None])
    return Compared(values, grad.scatter_add_(1, chunk.columns[:, None], coefficients[:, None]), gap=gap)


@dataclass(frozen=True)
class _OfActions:
    """The comparison that a rule makes."""

    rule: ActionRule
    buffers: int = 1

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        return lambda chunk: along_actions(chunk, *self.rule(chunk.taken(), chunk.index))


def action_loss(
    rule: ActionRule,
    student: Distribution,
    weights: torch.Tensor,
    actions: torch.Tensor,
    lengths: torch.Tensor,
    per_example: bool = False,
) -> Loss:
    """The operator for objectives that see the action taken and no teacher; arguments as in `divergence_loss`.

    A student of `Gaussian`s has its log-probabilities at hand, and nothing is cut into chunks.
    """
    if isinstance(student, Gaussian):
        moving = student.log_prob(actions)
        log_q, live = moving.detach(), weights != 0
        values, coefficients = (
            each.where(live, 0.0) for each in rule(log_q, torch.arange(len(log_q), device=log_q.device))
        )
        kept, moves = weights * values, weights * coefficients * (moving - log_q)
        each = sums_by_trajectory(kept + moves, lengths) if per_example else None
        return Loss(kept.sum() + moves.sum(), values, log_q.where(live, 0.0), each)
    assert isinstance(student, Categorical)
    return divergence_loss(_OfActions(rule), student, (), weights, actions, lengths, per_example=per_example)
