"""The loss operator: head projection, divergence and gradient, chunk by chunk over the positions that count.

Gradients are made in the forward pass, so that a chunk's logits are projected once and then forgotten. Nothing here
ever holds `[N, V]`, let alone `[B, T, V]`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from opd.distributions import Categorical, Distribution, Head, Sampled, TopK, append_tail
from opd.divergences.base import Divergence, Loss, Target
from opd.trajectories import Trajectories

CHUNK_BYTES = 32 * 2**20


class OnSupport(Divergence):
    """Divergences of two whole distributions: over the vocabulary, or over K ids and a tail bucket."""

    accepts: ClassVar[tuple[str, ...]] = ("categorical", "top_k")
    alternative: ClassVar[str] = "use reverse_kl_sampled, or ask the teacher for its top log-probabilities"
    top_k: int | None = Field(None, ge=1, description="Compare over K ids and a tail bucket; default the vocabulary")
    support_from: Literal["teacher", "student"] = Field("teacher", description="Whose K most likely ids, with top_k")

    @abstractmethod
    def value_and_grad(self, log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence and its gradient in the student's logits.

        Args:
            log_p: float32 `[C, S]`, the teacher's normalised log-probabilities on a support of S ids; may be
                overwritten.
            log_q: float32 `[C, S]`, the student's; may be overwritten.

        Returns:
            `[C]` values in nats and `[C, S]` gradients with respect to logits whose softmax is `exp(log_q)`.
        """

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
    ) -> Loss:
        return _on_categorical(self, student, targets, weights, trajectories)


class OnAction(Divergence):
    """Estimators that see only the action taken: policy gradients whose reward is a log-ratio."""

    accepts: ClassVar[tuple[str, ...]] = ("categorical", "sampled")
    alternative: ClassVar[str] = "ask the teacher for the log-probability of given tokens"
    discount: float = Field(0.0, ge=0.0, le=1.0)

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

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
    ) -> Loss:
        return _on_categorical(self, student, targets, weights, trajectories)


def _on_categorical(
    divergence: Divergence,
    student: Distribution,
    targets: Sequence[Target],
    weights: torch.Tensor,
    trajectories: Trajectories,
) -> Loss:
    assert isinstance(student, Categorical)
    return divergence_loss(divergence, student, targets, weights, trajectories.actions, trajectories.lengths)


def chunk_rows(vocabulary: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of one chunk, such that one float32 buffer `[rows, V]` takes at most `chunk_bytes` (never under 16 rows)."""
    return max(16, min(1024, chunk_bytes // (4 * vocabulary)))


def divergence_loss(
    divergence: Divergence,
    student: Categorical,
    targets: Sequence[Target],
    weights: torch.Tensor,
    actions: torch.Tensor,
    lengths: torch.Tensor,
    rows: int | None = None,
) -> Loss:
    """Compare the student with its targets at every position and differentiate.

    Memory beyond the inputs is at most `(2 + M) * 4 * R * V + 4 * R * V` bytes of chunk buffers, `N * D` for the
    gradient of the hidden states, and `4 * V * D` for the head's when it is trained (R rows a chunk, V ids, M targets);
    it does not depend on N beyond the second term.

    Args:
        divergence: the objective.
        student: `[N]` distributions with a graph through hidden states and head.
        targets: detached answers for the same N positions; their divergences are summed with their weights.
        weights: float32 `[N]`, detached, global denominator included; rows of weight zero are skipped.
        actions: int64 `[N]`, the ids taken.
        lengths: int64 `[B]`, positions of each trajectory, summing to N.
        rows: rows of a chunk; by default what `chunk_rows` says.
    """
    rows = rows or chunk_rows(student.head.size)
    plan = _Plan(divergence, student.head, tuple(targets), weights.float(), actions, lengths, rows)
    total, values, log_probs = _FusedDivergence.apply(student.hidden, student.head.weight, student.head.bias, plan)
    return Loss(total, values, log_probs)


@dataclass(frozen=True)
class _Plan:
    divergence: Divergence
    head: Head
    targets: tuple[Target, ...]
    weights: torch.Tensor
    actions: torch.Tensor
    lengths: torch.Tensor
    rows: int

    def cast(self, dtype: torch.dtype) -> _Plan:
        """The teachers' heads in the dtype of the student's, once and not once a chunk."""
        targets = []
        for target in self.targets:
            answer = target.distribution
            if isinstance(answer, Categorical):
                head = replace(answer.head, weight=answer.head.weight.to(dtype))
                answer = Categorical(answer.hidden, head)
            targets.append(Target(answer, target.weight))
        return replace(self, targets=tuple(targets), head=replace(self.head, weight=self.head.weight.to(dtype)))


class _FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, plan: _Plan):  # type: ignore[no-untyped-def]
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        plan = plan.cast(dtype) if torch.is_autocast_enabled(kind) else plan
        with torch.autocast(kind, enabled=False):
            total, values, log_probs, grads = _forward(hidden, weight, bias, plan, ctx.needs_input_grad, dtype)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(values, log_probs)
        return total, values, log_probs

    @staticmethod
    def backward(ctx, grad_total, _values, _log_probs):  # type: ignore[no-untyped-def]
        return (*(None if g is None else g.mul_(grad_total) for g in ctx.saved_tensors), None)


def _forward(hidden, weight, bias, plan: _Plan, needs_grad, dtype):  # type: ignore[no-untyped-def]
    head, divergence = plan.head, plan.divergence
    size = head.size
    matrix = weight[:size].detach().to(dtype)
    offset = None if bias is None else bias[:size].detach().float()
    device = hidden.device
    values, log_probs = torch.zeros(2, len(hidden), device=device)
    total = torch.zeros((), device=device, dtype=torch.float64)
    grad_hidden = torch.zeros_like(hidden) if needs_grad[0] else None
    grad_weight = torch.zeros(weight.shape, device=device) if needs_grad[1] else None
    grad_bias = torch.zeros(bias.shape, device=device) if bias is not None and needs_grad[2] else None

    live = plan.weights.nonzero().squeeze(1)
    coefficients = None
    if isinstance(divergence, OnAction) and divergence.discount:
        coefficients = _returns(hidden, plan)
    for index in torch.split(live, plan.rows):
        rows = hidden[index].detach().to(dtype)
        log_q, slope = _log_probs(rows, matrix, offset, head)
        log_probs[index] = log_q.gather(1, plan.actions[index, None]).squeeze(1)
        if isinstance(divergence, OnSupport):
            value, grad = _on_support(divergence, log_q, plan, index)
        else:
            assert isinstance(divergence, OnAction)
            value, grad = _on_action(divergence, log_q, plan, index, coefficients)
        chunk_weights = plan.weights[index]
        values[index] = value
        total += (value * chunk_weights).sum(dtype=torch.float64)
        if not any(needs_grad[:3]):
            continue
        grad.mul_((chunk_weights * (head.scale / head.temperature))[:, None])
        if slope is not None:
            grad.mul_(slope)
        if grad_bias is not None:
            grad_bias[:size] += grad.sum(0)
        grad = grad.to(dtype)
        if grad_hidden is not None:
            grad_hidden[index] = (grad @ matrix).to(hidden.dtype)
        if grad_weight is not None:
            if dtype == torch.float32:
                grad_weight[:size].addmm_(grad.T, rows)
            else:
                grad_weight[:size] += grad.T @ rows
    grads = (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )
    return total.float(), values, log_probs, grads


def _log_probs(
    rows: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor | None, head: Head
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 `[C, V]` log-probabilities of a chunk, and the slope of a soft cap where the head has one."""
    logits = (rows @ matrix.T).float()
    if offset is not None:
        logits += offset
    if head.scale != 1.0:
        logits *= head.scale
    slope = None
    if head.softcap is not None:
        capped = torch.tanh(logits / head.softcap)
        slope = 1 - capped * capped
        logits = capped.mul_(head.softcap)
    if head.temperature != 1.0:
        logits /= head.temperature
    return logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True)), slope


def head_log_probs(full: Categorical) -> torch.Tensor:
    """float32 `[C, V]` log-probabilities without a graph; the product runs in the head's dtype."""
    head = full.head
    matrix = head.masked_weight().detach()
    offset = None if head.bias is None else head.bias[: head.size].detach().float()
    return _log_probs(full.hidden.detach().to(matrix.dtype), matrix, offset, head)[0]


def _on_support(
    divergence: OnSupport, log_q: torch.Tensor, plan: _Plan, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    value, grad = None, None
    for place, target in enumerate(plan.targets):
        target = target.select(index)
        answer = target.distribution
        last = place == len(plan.targets) - 1
        if isinstance(answer, Categorical) and divergence.top_k is None:
            own = log_q if last else log_q.clone()
            v, g = divergence.value_and_grad(head_log_probs(answer), own)
        else:
            v, g = _on_buckets(divergence, log_q, answer)
        if not (isinstance(target.weight, float) and target.weight == 1.0):
            w = torch.as_tensor(target.weight, device=v.device, dtype=v.dtype)
            v = v * w
            g.mul_(w[:, None] if w.ndim else w)
        value = v if value is None else value + v
        grad = g if grad is None else grad.add_(g)
    assert value is not None
    assert grad is not None
    return value, grad


def _on_buckets(divergence: OnSupport, log_q: torch.Tensor, answer: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare over K ids and the tail; the tail's gradient is shared out in proportion to the student's probability."""
    if isinstance(answer, Categorical):
        assert divergence.top_k is not None
        full = head_log_probs(answer)
        source = log_q if divergence.support_from == "student" else full
        ids = source.topk(min(divergence.top_k, source.shape[-1] - 1), dim=-1).indices
        log_p = append_tail(full.gather(1, ids))
        del full
    else:
        assert isinstance(answer, TopK)
        log_p, ids = answer.with_tail(), answer.ids
    bucket_q = append_tail(log_q.gather(1, ids))
    log_tail = bucket_q[:, -1:].clone()
    value, bucket_grad = divergence.value_and_grad(log_p, bucket_q)
    grad = (log_q - log_tail).exp_().mul_(bucket_grad[:, -1:])
    return value, grad.scatter_(1, ids, bucket_grad[:, :-1])


def _action_log_probs(answer: Distribution, actions: torch.Tensor) -> torch.Tensor:
    if isinstance(answer, Sampled):
        return answer.log_probs.float()
    assert isinstance(answer, Categorical)
    return head_log_probs(answer).gather(1, actions[:, None]).squeeze(1)


def _on_action(
    divergence: OnAction,
    log_q: torch.Tensor,
    plan: _Plan,
    index: torch.Tensor,
    coefficients: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    actions = plan.actions[index]
    taken = log_q.gather(1, actions[:, None]).squeeze(1)
    if coefficients is None:
        lengths = torch.ones(len(index), dtype=torch.int64)
        value, coefficient = _sum_targets(divergence, taken, [t.select(index) for t in plan.targets], actions, lengths)
    else:
        value, coefficient = coefficients[0][index], coefficients[1][index]
    # d log q(a) / d logits = onehot(a) - q
    grad = log_q.exp_().mul_(-coefficient[:, None])
    grad.scatter_add_(1, actions[:, None], coefficient[:, None])
    return value, grad


def _sum_targets(
    divergence: OnAction,
    taken: torch.Tensor,
    targets: Sequence[Target],
    actions: torch.Tensor,
    lengths: torch.Tensor,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    value, coefficient = torch.zeros_like(taken), torch.zeros_like(taken)
    for target in targets:
        step = rows or len(actions)
        log_p = torch.cat(
            [
                _action_log_probs(target.distribution.select(slice(s, s + step)), actions[s : s + step])
                for s in range(0, len(actions), step)
            ]
        )
        v, c = divergence.value_and_coefficient(log_p, taken, lengths)
        value += v * target.weight
        coefficient += c * target.weight
    return value, coefficient


def _returns(hidden: torch.Tensor, plan: _Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and coefficients of all N positions, for estimators that credit a position with what follows it."""
    student = Categorical(hidden.detach(), plan.head.detach())
    taken = torch.cat(
        [
            _action_log_probs(student.select(slice(s, s + plan.rows)), plan.actions[s : s + plan.rows])
            for s in range(0, len(hidden), plan.rows)
        ]
    )
    assert isinstance(plan.divergence, OnAction)
    return _sum_targets(plan.divergence, taken, plan.targets, plan.actions, plan.lengths, plan.rows)
