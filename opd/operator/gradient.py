"""A loss and its gradient in hidden states and head, chunk by chunk.

Gradients are made in the forward pass, so that a chunk's logits are projected once and then forgotten. Nothing here
ever holds `[N, V]`, let alone `[B, T, V]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from opd.distributions import Categorical, Head, Routed, Target, compared_in
from opd.operator.chunks import Chunk, Comparison, Whole, chunk_rows
from opd.operator.head import STUDENT, Buffers, answer_in, check_same_ids, head_in, project
from opd.operator.loss import Loss


def divergence_loss(
    comparison: Comparison,
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
    comparison asks for (none for either KL, 1 for Jensen-Shannon and the mixture, 2 more with several teachers),
    `4 * D + 64` bytes a position, `16 * R * D` for a chunk's rows, and `4 * V * D` for the head's gradient when it is
    trained: `memory_bound` computes it. No term grows with `N * V`. A model in another dtype adds one chunk buffer in
    that dtype.

    Args:
        comparison: a divergence, or what else says value and gradient of a chunk.
        student: `[N]` distributions with a graph through hidden states and head.
        targets: detached answers for the same N positions; their divergences are summed with their weights.
        weights: float32 `[N]`, detached, global denominator included; rows of weight zero are never projected.
        actions: int64 `[N]`, the ids taken: at positions that count, ids of the student's vocabulary.
        lengths: int64 `[B]`, positions of each trajectory, summing to N.
        rows: rows R of a chunk; by default what `chunk_rows` says.
        per_example: also return `Loss.per_example`, whose entries can be differentiated one by one or with any
            weights. The head's gradient is then made in the backward pass, by projecting the rows concerned again.

    Raises:
        IncompatibleError: a target is over other ids than the student, or an action is none of its vocabulary.
    """
    for target in targets:
        check_same_ids(student.head, target)
    rows = rows or chunk_rows(student.head.size)
    plan = _Plan(comparison, student.head, tuple(targets), weights.float(), actions, lengths, rows)
    function = _PerExample if per_example else _Total
    result, values, log_probs, gaps = function.apply(student.hidden, student.head.weight, student.head.bias, plan)
    gap = gaps if targets else None
    if per_example:
        return Loss(result.sum(), values, log_probs, result, gap=gap)
    return Loss(result, values, log_probs, gap=gap)


@dataclass(frozen=True)
class _Plan:
    comparison: Comparison
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

    def columns(self, live: torch.Tensor) -> torch.Tensor:
        """int64 `[N]`: the columns of the actions taken; where a position does not count, of a slice the first."""
        vocabulary = self.head.vocabulary
        if vocabulary.ids is None:
            return self.actions
        found = torch.zeros_like(self.actions)
        found[live] = vocabulary.columns(self.actions[live])
        return found

    def resolved(self, hidden: torch.Tensor) -> _Plan:
        """Heads without a graph, under autocast in its dtype."""
        kind = hidden.device.type
        if not torch.is_autocast_enabled(kind):
            return replace(self, head=self.head.detach())
        dtype = torch.get_autocast_dtype(kind)
        targets = tuple(replace(t, distribution=answer_in(t.distribution, dtype)) for t in self.targets)
        return replace(self, targets=targets, head=head_in(self.head, dtype))

    def parts(self, positions: torch.Tensor) -> Iterator[torch.Tensor]:
        """`positions` in parts of at most `rows`; where answers are routed, each part has one teacher of each target,
        so that no row is projected by another one's head; and where one has no distribution, none at all of a part."""
        parts = [positions]
        answers = [target.distribution for target in self.targets]
        kinds = [answer.owners for answer in answers if isinstance(answer, Routed)]
        kinds += [compared for answer in answers if (compared := compared_in(answer)) is not None]
        for owners in kinds:
            parts = [part[owners[part] == owner] for part in parts for owner in owners[part].unique()]
        for part in parts:
            yield from torch.split(part, self.rows)


class _Total(torch.autograd.Function):
    """One number; all gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, plan: _Plan):  # type: ignore[no-untyped-def]
        plan = plan.resolved(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            done = _run(hidden, weight, bias, plan, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*done.grads)
        ctx.mark_non_differentiable(done.values, done.log_probs, done.gaps)
        return (done.values * done.weights).sum(), done.values, done.log_probs, done.gaps

    @staticmethod
    def backward(ctx, grad_total, _values, _log_probs, _gaps):  # type: ignore[no-untyped-def]
        return (*(None if g is None else g.mul_(grad_total) for g in ctx.saved_tensors), None)


class _PerExample(torch.autograd.Function):
    """B numbers; hidden gradients are separable by row, the head's are made for the weights that backward is given."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, plan: _Plan):  # type: ignore[no-untyped-def]
        plan = plan.resolved(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            done = _run(hidden, weight, bias, plan, (ctx.needs_input_grad[0], False, False))
        owners = plan.owners()
        totals = torch.zeros(len(plan.lengths), device=hidden.device)
        totals.index_add_(0, owners, done.values * done.weights)
        ctx.plan, ctx.owners = plan, owners
        ctx.save_for_backward(hidden, weight, bias, done.grads[0])
        ctx.mark_non_differentiable(done.values, done.log_probs, done.gaps)
        return totals, done.values, done.log_probs, done.gaps

    @staticmethod
    def backward(ctx, grad_totals, _values, _log_probs, _gaps):  # type: ignore[no-untyped-def]
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


@dataclass(frozen=True)
class _Done:
    """`weights` are the plan's times the shares that the comparison gave."""

    weights: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor
    gaps: torch.Tensor
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _run(hidden, weight, bias, plan: _Plan, needs: tuple[bool, bool, bool]) -> _Done:  # type: ignore[no-untyped-def]
    head, device = plan.head, hidden.device
    matrix = head.masked_weight()
    dtype, size = matrix.dtype, head.size
    values, log_probs, gaps = torch.zeros(3, len(hidden), device=device)
    grad_hidden = torch.zeros_like(hidden) if needs[0] else None
    grad_weight = torch.zeros(weight.shape, device=device) if needs[1] else None
    grad_bias = torch.zeros(bias.shape, device=device) if bias is not None and needs[2] else None
    weights = plan.weights.clone()
    live = weights.nonzero().squeeze(1)
    buffers = Buffers(min(plan.rows, max(1, len(live))), size, device)
    columns = plan.columns(live)
    whole = Whole(Categorical(hidden.detach(), head), columns, plan.targets, plan.lengths, buffers)
    compare = plan.comparison.begin(whole)

    for index in plan.parts(live):
        rows = hidden[index].detach().to(dtype)
        log_q, slope = project(rows, head, buffers, STUDENT)
        targets = tuple(target.select(index) for target in plan.targets)
        chunk = Chunk(log_q, index, columns[index], head.vocabulary, targets, buffers)
        log_probs[index] = chunk.taken()
        compared = compare(chunk)
        values[index] = compared.values
        gaps[index] = torch.nan if compared.gap is None else compared.gap
        if compared.share is not None:
            weights[index] *= compared.share
        if not any(needs):
            continue
        grad = compared.gradient
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
        gaps,
        (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        ),
    )
