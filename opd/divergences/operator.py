"""The loss operator: head projection, divergence and gradient, chunk by chunk over the positions that count.

Gradients are made in the forward pass, so that a chunk's logits are projected once and then forgotten. Nothing here
ever holds `[N, V]`, let alone `[B, T, V]`. The chunk's buffers are allocated once a call and written over: on a CPU,
fresh pages for every intermediate cost more than the arithmetic on them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from opd.distributions import Categorical, Distribution, Gaussian, Head, Routed, Sampled, TopK, append_tail
from opd.distributions.categorical import NOWHERE
from opd.divergences.base import CategoricalDivergence, Divergence
from opd.errors import IncompatibleError
from opd.objectives.base import Loss, Target, Writing
from opd.schedules import OverSteps
from opd.trajectories import Trajectories

CHUNK_BYTES = 16 * 2**20
"""Target size of one float32 chunk buffer `[R, V]`."""

SMALLEST_CHUNK = 128
"""Rows below which the matrix products become inefficient; a large vocabulary then exceeds `CHUNK_BYTES`."""

LARGEST_BUFFER = 48 * 2**20
"""Bytes that no buffer exceeds however large the vocabulary; from V = 98,304 on a chunk has fewer rows instead."""


class OnSupport(CategoricalDivergence):
    """Divergences of two whole distributions: over the vocabulary, or over K ids and a tail bucket."""

    accepts: ClassVar[tuple[str, ...]] = ("categorical", "top_k")
    alternative: ClassVar[str] = "use reverse_kl_sampled, or ask the teacher for its top log-probabilities"
    buffers: ClassVar[int] = 1
    """How many scratch buffers `[C, S]` `value_and_grad` needs; the first is there anyway."""

    top_k: Annotated[int, OverSteps(ge=1)] | None = Field(
        None, description="Compare over K ids and a tail bucket; default the vocabulary"
    )
    support_from: Literal["teacher", "student"] = Field("teacher", description="Whose K most likely ids, with top_k")
    clip: Annotated[float, OverSteps(gt=0)] | None = Field(
        None,
        description="Most that a position may contribute, in nats: a larger value is scaled down to it, its "
        "gradient with it; default no bound",
    )

    @field_validator("support_from")
    @classmethod
    def _of_a_support(cls, value: str, info: ValidationInfo) -> str:
        if value == "student" and "top_k" in info.data and info.data["top_k"] is None:
            raise ValueError("without top_k the support is the whole vocabulary; set top_k, or remove the key")
        return value

    @property
    def unbiased(self) -> bool:
        """Over K ids and a tail the gradient is exact for that coarser support, not for the vocabulary; clipped
        positions weigh less."""
        return self.top_k is None and self.clip is None

    @abstractmethod
    def value_and_grad(
        self, log_p: torch.Tensor, log_q: torch.Tensor, scratch: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence and its gradient in the student's logits.

        Args:
            log_p: float32 `[C, S]`, the teacher's normalised log-probabilities on a support of S ids; overwritten.
            log_q: float32 `[C, S]`, the student's; overwritten.
            scratch: `buffers` uninitialised tensors of the same shape.

        Returns:
            `[C]` values in nats and `[C, S]` gradients with respect to logits whose softmax is `exp(log_q)`; the
            gradient may lie in any of the tensors that were passed.
        """

    def __call__(
        self, student: Distribution, targets: Sequence[Target], weights: torch.Tensor, trajectories: Trajectories
    ) -> Loss:
        loss = _on_categorical(self, student, targets, weights, trajectories)
        return loss if self.clip is None else replace(loss, measured={"clipped": (loss.values > self.clip).float()})


class OnAction(CategoricalDivergence):
    """Estimators that see only the action taken: policy gradients whose reward is a log-ratio."""

    accepts: ClassVar[tuple[str, ...]] = ("categorical", "sampled")
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
            log_p: float32 `[N]`, the teacher's log-probability of each action taken; detached.
            log_q: float32 `[N]`, the student's; detached.
            lengths: int64 `[B]`, positions of each trajectory, summing to N.

        Returns:
            `[N]` values in nats and `[N]` coefficients: the position's gradient is `coefficient * grad log q(action)`.
        """

    def __call__(
        self, student: Distribution, targets: Sequence[Target], weights: torch.Tensor, trajectories: Trajectories
    ) -> Loss:
        return _on_categorical(self, student, targets, weights, trajectories)

    def check_trajectories(self, rollout: Writing) -> None:
        if rollout.authors != {"student"} or not rollout.current:
            kind = self.model_dump()["kind"]
            raise IncompatibleError(
                f"objective {kind!r} needs the student's own samples: on others its expectation is not what it says. "
                "Take rollout: student, or reverse_kl, which compares whole distributions, or on stored ones lightning"
            )


ActionRule = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`(log_q [C], index [C]) -> (values [C], coefficients [C])`: the student's log-probabilities of the actions taken at
the positions `index`, detached; a position's gradient is `coefficient * grad log q(action)`."""


def _on_categorical(
    divergence: Divergence,
    student: Distribution,
    targets: Sequence[Target],
    weights: torch.Tensor,
    trajectories: Trajectories,
) -> Loss:
    assert isinstance(student, Categorical)
    return divergence_loss(divergence, student, targets, weights, trajectories.actions, trajectories.lengths)


def chunk_rows(vocabulary: int) -> int:
    """Rows R of one chunk: one float32 buffer `[R, V]` takes about `CHUNK_BYTES`, within `SMALLEST_CHUNK` and 1024; of
    very large vocabularies at most `LARGEST_BUFFER`, in multiples of eight rows."""
    rows = max(SMALLEST_CHUNK, min(1024, CHUNK_BYTES // (4 * vocabulary)))
    return min(rows, max(8, LARGEST_BUFFER // (4 * vocabulary) // 8 * 8))


def memory_bound(
    divergence: Divergence, positions: int, width: int, vocabulary: int, rows: int | None = None, trained: bool = True
) -> int:
    """Bytes that `divergence_loss` allocates at most beyond its inputs, for float32 models and one teacher; `width` is
    the larger of both hidden widths."""
    rows = min(rows or chunk_rows(vocabulary), positions)
    buffers = 2 + getattr(divergence, "buffers", 1)
    thin = positions * (4 * width + 64) + 16 * rows * width + 2**16
    return 4 * rows * vocabulary * buffers + thin + (4 * vocabulary * width if trained else 0)


def divergence_loss(
    divergence: Divergence | ActionRule,
    student: Categorical,
    targets: Sequence[Target],
    weights: torch.Tensor,
    actions: torch.Tensor,
    lengths: torch.Tensor,
    rows: int | None = None,
    per_example: bool = False,
) -> Loss:
    """Compare the student with its targets at every position and differentiate.

    Memory beyond the inputs, for a float32 model: `4 * R * V` bytes for each of 3 chunk buffers and those that the
    divergence asks for (none for either KL, 1 for Jensen-Shannon and the mixture, 2 more with several teachers),
    `4 * D + 64` bytes a position, `16 * R * D` for a chunk's rows, and `4 * V * D` for the head's gradient when it is
    trained: `memory_bound` computes it. No term grows with `N * V`. A model in another dtype adds one chunk buffer in
    that dtype.

    Args:
        divergence: the objective, or a rule over the actions taken.
        student: `[N]` distributions with a graph through hidden states and head.
        targets: detached answers for the same N positions; their divergences are summed with their weights.
        weights: float32 `[N]`, detached, global denominator included; rows of weight zero are never projected.
        actions: int64 `[N]`, the ids taken.
        lengths: int64 `[B]`, positions of each trajectory, summing to N.
        rows: rows R of a chunk; by default what `chunk_rows` says.
        per_example: also return `Loss.per_example`, whose entries can be differentiated one by one or with any
            weights. The head's gradient is then made in the backward pass, by projecting the rows concerned again.
    """
    rows = rows or chunk_rows(student.head.size)
    plan = _Plan(divergence, student.head, tuple(targets), weights.float(), actions, lengths, rows)
    function = _PerExample if per_example else _Total
    result, values, log_probs = function.apply(student.hidden, student.head.weight, student.head.bias, plan)
    if per_example:
        return Loss(result.sum(), values, log_probs, result)
    return Loss(result, values, log_probs)


def action_loss(
    rule: ActionRule,
    student: Distribution,
    weights: torch.Tensor,
    actions: torch.Tensor,
    lengths: torch.Tensor,
    rows: int | None = None,
    per_example: bool = False,
) -> Loss:
    """The same operator for objectives that see the action taken and no teacher; arguments as in `divergence_loss`.

    A student of `Gaussian`s has its log-probabilities at hand, and nothing is cut into chunks.
    """
    if isinstance(student, Gaussian):
        moving = student.log_prob(actions)
        log_q, live = moving.detach(), weights != 0
        values, coefficients = (
            each.where(live, 0.0) for each in rule(log_q, torch.arange(len(log_q), device=log_q.device))
        )
        total = (weights * values).sum() + (weights * coefficients * (moving - log_q)).sum()
        return Loss(total, values, log_q.where(live, 0.0))
    assert isinstance(student, Categorical)
    return divergence_loss(rule, student, (), weights, actions, lengths, rows, per_example)


@dataclass(frozen=True)
class _Plan:
    divergence: Divergence | ActionRule
    head: Head
    targets: tuple[Target, ...]
    weights: torch.Tensor
    actions: torch.Tensor
    lengths: torch.Tensor
    rows: int

    def owners(self) -> torch.Tensor:
        """int64 `[N]`: the trajectory that each position belongs to."""
        lengths = self.lengths.to(self.weights.device)
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    def in_compute_dtype(self, dtype: torch.dtype) -> _Plan:
        """Both sides' heads in one dtype, cast once and not once a chunk."""

        def cast(head: Head) -> Head:
            return replace(head, weight=head.weight.detach().to(dtype))

        def answer(given: Distribution) -> Distribution:
            if isinstance(given, Routed):
                return replace(given, parts=tuple(answer(part) for part in given.parts))
            return replace(given, head=cast(given.head)) if isinstance(given, Categorical) else given

        targets = tuple(replace(t, distribution=answer(t.distribution)) for t in self.targets)
        return replace(self, targets=targets, head=cast(self.head))

    def chunks(self, positions: torch.Tensor) -> Iterator[torch.Tensor]:
        """`positions` in parts of at most `rows`; where answers are routed, each part has one teacher of each target,
        so that no row is projected by another one's head."""
        parts = [positions]
        for owners in (t.distribution.owners for t in self.targets if isinstance(t.distribution, Routed)):
            parts = [part[owners[part] == owner] for part in parts for owner in owners[part].unique()]
        for part in parts:
            yield from torch.split(part, self.rows)


class _Total(torch.autograd.Function):
    """One number; all gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, plan: _Plan):  # type: ignore[no-untyped-def]
        plan = _resolve(plan, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            done = _run(hidden, weight, bias, plan, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*done.grads)
        ctx.mark_non_differentiable(done.values, done.log_probs)
        return (done.values * done.weights).sum(), done.values, done.log_probs

    @staticmethod
    def backward(ctx, grad_total, _values, _log_probs):  # type: ignore[no-untyped-def]
        return (*(None if g is None else g.mul_(grad_total) for g in ctx.saved_tensors), None)


class _PerExample(torch.autograd.Function):
    """B numbers; hidden gradients are separable by row, the head's are made for the weights that backward is given."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, plan: _Plan):  # type: ignore[no-untyped-def]
        plan = _resolve(plan, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            done = _run(hidden, weight, bias, plan, (ctx.needs_input_grad[0], False, False))
        owners = plan.owners()
        totals = torch.zeros(len(plan.lengths), device=hidden.device)
        totals.index_add_(0, owners, done.values * done.weights)
        ctx.plan, ctx.owners = plan, owners
        ctx.save_for_backward(hidden, weight, bias, done.grads[0])
        ctx.mark_non_differentiable(done.values, done.log_probs)
        return totals, done.values, done.log_probs

    @staticmethod
    def backward(ctx, grad_totals, _values, _log_probs):  # type: ignore[no-untyped-def]
        hidden, weight, bias, grad_hidden = ctx.saved_tensors
        share = grad_totals[ctx.owners]
        needs = (False, *ctx.needs_input_grad[1:3])
        grads: tuple[torch.Tensor | None, ...] = (None, None, None)
        if any(needs):
            plan = replace(ctx.plan, weights=ctx.plan.weights * share)
            with torch.autocast(hidden.device.type, enabled=False):
                grads = _run(hidden, weight, bias, plan, needs).grads
        if grad_hidden is not None:
            grad_hidden = grad_hidden * share[:, None].to(grad_hidden.dtype)
        return grad_hidden, grads[1], grads[2], None


def _resolve(plan: _Plan, hidden: torch.Tensor) -> _Plan:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return plan.in_compute_dtype(torch.get_autocast_dtype(kind))
    return replace(plan, head=plan.head.detach())


@dataclass(frozen=True)
class _Done:
    """`weights` are the plan's, less where a position was clipped."""

    weights: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class _Buffers:
    """Float32 chunk buffers `[R, V]` by number, made when first asked for and reused by every chunk."""

    def __init__(self, rows: int, size: int, device: torch.device):
        self.rows, self.size, self.device = rows, size, device
        self.made: dict[int, torch.Tensor] = {}

    def get(self, number: int, rows: int) -> torch.Tensor:
        if number not in self.made:
            self.made[number] = torch.empty(self.rows, self.size, device=self.device)
        return self.made[number][:rows]


RAW, STUDENT, TEACHER, SCRATCH, SUM, KEPT = 0, 1, 2, 3, 4, 5
"""Numbers of the buffers: logits before normalisation (scratch afterwards), each side's log-probabilities, more
scratch, and for several teachers the sum of gradients and the student's log-probabilities."""


def _run(hidden, weight, bias, plan: _Plan, needs: tuple[bool, bool, bool]) -> _Done:  # type: ignore[no-untyped-def]
    head, divergence, device = plan.head, plan.divergence, hidden.device
    matrix = head.masked_weight()
    dtype, size = matrix.dtype, head.size
    values, log_probs = torch.zeros(2, len(hidden), device=device)
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    grad_weight = torch.zeros(weight.shape, device=device) if needs[1] else None
    grad_bias = torch.zeros(bias.shape, device=device) if bias is not None and needs[2] else None
    weights, clip = plan.weights, None
    if isinstance(divergence, OnSupport) and divergence.clip is not None:
        weights, clip = weights.clone(), float(divergence.clip)
    live = weights.nonzero().squeeze(1)
    buffers = _Buffers(min(plan.rows, max(1, len(live))), size, device)
    known = None
    if isinstance(divergence, OnAction) and divergence.sees_whole_trajectories:
        known = _returns(hidden, plan, buffers)

    for index in plan.chunks(live):
        rows = hidden[index].detach().to(dtype)
        log_q, slope = _log_probs(rows, head, buffers, STUDENT)
        log_probs[index] = log_q.gather(1, plan.actions[index, None]).squeeze(1)
        if isinstance(divergence, OnSupport):
            value, grad = _on_support(divergence, log_q, plan, index, buffers)
        else:
            value, grad = _on_action(divergence, log_q, plan, index, known, buffers)
        values[index] = value
        if clip is not None:
            weights[index] *= clip / value.clamp(min=clip)
        if not any(needs):
            continue
        if slope is not None:
            grad.mul_(slope)
        if head.excluded is not None:
            grad.index_fill_(1, head.excluded, 0.0)
        grad = grad.to(dtype)
        # The position's weight goes on the thin side of each product, not over [R, V].
        share = (weights[index] * (head.scale / head.temperature))[:, None]
        if grad_hidden is not None:
            grad_hidden[index] = ((grad @ matrix) * share).to(hidden.dtype)
        if grad_weight is not None:
            weighted = rows * share.to(dtype)
            if dtype == torch.float32:
                grad_weight[:size].addmm_(grad.T, weighted)
            else:
                grad_weight[:size] += grad.T @ weighted
        if grad_bias is not None:
            grad_bias[:size] += (share.T.to(dtype) @ grad).squeeze(0)
    return _Done(
        weights,
        values,
        log_probs,
        (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        ),
    )


def _log_probs(
    rows: torch.Tensor, head: Head, buffers: _Buffers, place: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 `[C, V]` log-probabilities of a chunk in buffer `place`, and the slope of a soft cap, if any."""
    raw, result = buffers.get(RAW, len(rows)), buffers.get(place, len(rows))
    matrix = head.masked_weight()
    if matrix.dtype == torch.float32:
        torch.mm(rows, matrix.T, out=raw)
    else:
        raw.copy_(rows @ matrix.T)
    if head.bias is not None:
        raw.add_(head.bias[: head.size])
    if head.scale != 1.0:
        raw.mul_(head.scale)
    slope = None
    if head.softcap is not None:
        capped = raw.div_(head.softcap).tanh_()
        slope = 1 - capped * capped
        raw = capped.mul_(head.softcap)
    if head.temperature != 1.0:
        raw.div_(head.temperature)
    if head.excluded is not None:
        raw.index_fill_(1, head.excluded, NOWHERE)
    torch.ops.aten._log_softmax.out(raw, -1, False, out=result)
    return result, slope


def _answer_log_probs(full: Categorical, buffers: _Buffers) -> torch.Tensor:
    dtype = full.head.weight.dtype
    return _log_probs(full.hidden.detach().to(dtype), full.head, buffers, TEACHER)[0]


def _on_support(
    divergence: OnSupport, log_q: torch.Tensor, plan: _Plan, index: torch.Tensor, buffers: _Buffers
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(index)
    scratch = [buffers.get(place, rows) for place in (RAW, SCRATCH)[: divergence.buffers]]
    if len(plan.targets) == 1:
        return _weighted(divergence, log_q, plan.targets[0].select(index), buffers, scratch)
    value = torch.zeros(rows, device=log_q.device)
    total = buffers.get(SUM, rows).zero_()
    kept = buffers.get(KEPT, rows).copy_(log_q)
    for target in plan.targets:
        log_q.copy_(kept)
        v, g = _weighted(divergence, log_q, target.select(index), buffers, scratch)
        value += v
        total += g
    return value, total


def _weighted(
    divergence: OnSupport, log_q: torch.Tensor, target: Target, buffers: _Buffers, scratch: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    ((_, answer),) = target.distribution.pieces()
    if isinstance(answer, Categorical) and divergence.top_k is None:
        value, grad = divergence.value_and_grad(_answer_log_probs(answer, buffers), log_q, scratch)
    else:
        value, grad = _on_buckets(divergence, log_q, answer, buffers)
    if not (isinstance(target.weight, float) and target.weight == 1.0):
        weight = torch.as_tensor(target.weight, device=value.device, dtype=value.dtype)
        value = value * weight
        grad.mul_(weight[:, None] if weight.ndim else weight)
    return value, grad


def _on_buckets(
    divergence: OnSupport, log_q: torch.Tensor, answer: Distribution, buffers: _Buffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare over K ids and the tail; the tail's gradient is shared out in proportion to the student's probability."""
    if isinstance(answer, Categorical):
        assert divergence.top_k is not None
        full = _answer_log_probs(answer, buffers)
        source = log_q if divergence.support_from == "student" else full
        ids = source.topk(min(divergence.top_k, source.shape[-1] - 1), dim=-1).indices
        log_p = append_tail(full.gather(1, ids))
    else:
        assert isinstance(answer, TopK)
        log_p, ids = answer.with_tail(), answer.ids
    bucket_q = append_tail(log_q.gather(1, ids))
    log_tail = bucket_q[:, -1:].clone()
    scratch = [torch.empty_like(bucket_q) for _ in range(divergence.buffers)]
    value, bucket_grad = divergence.value_and_grad(log_p, bucket_q, scratch)
    grad = log_q.sub_(log_tail).exp_().mul_(bucket_grad[:, -1:])
    return value, grad.scatter_(1, ids, bucket_grad[:, :-1])


def _action_log_probs(answer: Distribution, actions: torch.Tensor, buffers: _Buffers) -> torch.Tensor:
    if isinstance(answer, Sampled):
        return answer.log_probs.float()
    assert isinstance(answer, Categorical)
    return _answer_log_probs(answer, buffers).gather(1, actions[:, None]).squeeze(1)


def _on_action(
    divergence: Divergence | ActionRule,
    log_q: torch.Tensor,
    plan: _Plan,
    index: torch.Tensor,
    known: tuple[torch.Tensor, torch.Tensor] | None,
    buffers: _Buffers,
) -> tuple[torch.Tensor, torch.Tensor]:
    actions = plan.actions[index]
    taken = log_q.gather(1, actions[:, None]).squeeze(1)
    if not isinstance(divergence, OnAction):
        value, coefficient = divergence(taken, index)  # type: ignore[call-arg, arg-type, misc]
    elif known is None:
        targets = [t.select(index) for t in plan.targets]
        value, coefficient = _sum_targets(divergence, taken, targets, actions, torch.ones(len(index)).long(), buffers)
    else:
        value, coefficient = known[0][index], known[1][index]
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
    buffers: _Buffers,
) -> tuple[torch.Tensor, torch.Tensor]:
    value, coefficient = torch.zeros_like(taken), torch.zeros_like(taken)
    for target in targets:
        log_p = _by_chunks(target.distribution, actions, buffers)
        v, c = divergence.value_and_coefficient(log_p, taken, lengths)
        value += v * target.weight
        coefficient += c * target.weight
    return value, coefficient


def _by_chunks(answer: Distribution, actions: torch.Tensor, buffers: _Buffers) -> torch.Tensor:
    found = torch.empty(len(actions), device=actions.device)
    for mine, piece in answer.pieces():
        for start in range(0, len(piece), buffers.rows):
            here = slice(start, start + buffers.rows)
            positions = mine[here].to(actions.device)
            found[positions] = _action_log_probs(piece.select(here), actions[positions], buffers)
    return found


def _returns(hidden: torch.Tensor, plan: _Plan, buffers: _Buffers) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and coefficients of all N positions, for estimators that credit a position with what follows it."""
    taken = _by_chunks(Categorical(hidden.detach(), plan.head), plan.actions, buffers)
    assert isinstance(plan.divergence, OnAction)
    return _sum_targets(plan.divergence, taken, plan.targets, plan.actions, plan.lengths, buffers)
