"""What the operator and a comparison say to each other, chunk by chunk, and how large a chunk is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from opd.distributions import Categorical, Distribution, Sampled, Target, Vocabulary
from opd.operator.head import KEPT, RAW, SCRATCH, SUM, Buffers, answer_log_probs

CHUNK_BYTES = 16 * 2**20
"""Target size of one float32 chunk buffer `[R, V]`."""

SMALLEST_CHUNK = 128
"""Rows below which the matrix products become inefficient; a large vocabulary then exceeds `CHUNK_BYTES`."""

LARGEST_BUFFER = 48 * 2**20
"""Bytes that no buffer exceeds however large the vocabulary; from V = 98,304 on a chunk has fewer rows instead."""


@dataclass(frozen=True)
class Compared:
    """What a comparison finds at the C positions of a chunk.

    Attributes:
        values: float32 `[C]`, in nats.
        gradient: float32 `[C, V]`, of each position's value in the student's logits, whose softmax is `exp(log_q)`; may
            lie in any buffer of the chunk.
        share: float32 `[C]`, detached: what the positions' weights are multiplied by; None leaves them as they are.
        gap: float32 `[C]`: how far student and teachers are apart, see `Loss`; None says nothing of it.
    """

    values: torch.Tensor
    gradient: torch.Tensor
    share: torch.Tensor | None = None
    gap: torch.Tensor | None = None


@dataclass(frozen=True)
class Chunk:
    """C of the positions that count, with the student's log-probabilities at hand. Everything is detached.

    Attributes:
        log_q: float32 `[C, V]`, the student's log-probabilities; the comparison may write over them.
        index: int64 `[C]`, which of the N positions these are.
        columns: int64 `[C]`, those of the actions taken.
        vocabulary: the ids that student and teachers are over, a column each.
        targets: the teachers' answers here; each is one distribution (routed answers are cut so).
    """

    log_q: torch.Tensor
    index: torch.Tensor
    columns: torch.Tensor
    vocabulary: Vocabulary
    targets: tuple[Target, ...]
    buffers: Buffers

    def taken(self) -> torch.Tensor:
        """float32 `[C]`, the student's log-probability of each action taken."""
        return self.log_q.gather(1, self.columns[:, None]).squeeze(1)

    def answered(self, target: Target) -> torch.Tensor:
        """float32 `[C]`, a teacher's log-probability of each action taken, with a shaping's offset."""
        return _answered(target, self.columns, self.buffers)

    def log_p(self, answer: Categorical) -> torch.Tensor:
        """float32 `[C, V]`, what a teacher says of every column; may be written over, and is by the next call."""
        return answer_log_probs(answer, self.buffers)

    def scratch(self, count: int) -> list[torch.Tensor]:
        """`count` (at most 2) uninitialised tensors of the shape of `log_q`."""
        return [self.buffers.get(place, len(self.log_q)) for place in (RAW, SCRATCH)[:count]]

    def over_targets(self, compare: Callable[[Distribution], Compared]) -> Compared:
        """Values and gradients of a comparison with one answer, summed over the targets with their weights; the gap is
        the largest of those that have any. `compare` finds `log_q` as it was each time."""
        if len(self.targets) == 1:
            return self._weighted(self.targets[0], compare)
        rows = len(self.log_q)
        value = torch.zeros(rows, device=self.log_q.device)
        total = self.buffers.get(SUM, rows).zero_()
        kept = self.buffers.get(KEPT, rows).copy_(self.log_q)
        gap: torch.Tensor | None = torch.zeros_like(value)
        for target in self.targets:
            self.log_q.copy_(kept)
            one = self._weighted(target, compare)
            value += one.values
            total += one.gradient
            gap = None if gap is None or one.gap is None else torch.maximum(gap, one.gap)
        return Compared(value, total, gap=gap)

    @staticmethod
    def _weighted(target: Target, compare: Callable[[Distribution], Compared]) -> Compared:
        ((_, answer),) = target.distribution.pieces()
        one = compare(answer)
        if isinstance(target.weight, float) and target.weight == 1.0:
            return one
        weight = torch.as_tensor(target.weight, device=one.values.device, dtype=one.values.dtype)
        one.gradient.mul_(weight[:, None] if weight.ndim else weight)
        gap = None if one.gap is None else one.gap * (weight != 0)
        return replace(one, values=one.values * weight, gap=gap)


@dataclass(frozen=True)
class Whole:
    """All N positions of a call, for comparisons that credit a position with what follows it. Everything is detached.

    Attributes:
        student: `[N]` distributions.
        columns: int64 `[N]`, those of the actions taken.
        targets: the teachers' answers.
        lengths: int64 `[B]`, positions of each trajectory, summing to N.
    """

    student: Categorical
    columns: torch.Tensor
    targets: tuple[Target, ...]
    lengths: torch.Tensor
    buffers: Buffers

    def taken(self) -> torch.Tensor:
        """float32 `[N]`, the student's log-probability of each action taken."""
        return action_log_probs(self.student, self.columns, self.buffers)

    def answered(self, target: Target) -> torch.Tensor:
        """float32 `[N]`, a teacher's log-probability of each action taken, with a shaping's offset."""
        return _answered(target, self.columns, self.buffers)


class Comparison(Protocol):
    """What a divergence, or a rule over the actions taken, brings to the operator."""

    @property
    def buffers(self) -> int:
        """How many tensors of `Chunk.scratch` it asks for; the first is there anyway."""

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        """Called once, before the chunks: the function that compares one chunk."""


def action_log_probs(answer: Distribution, columns: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """float32 `[N]`, what an answer for N positions says of the actions taken there (their `columns`), a chunk at a
    time."""
    found = torch.empty(len(columns), device=columns.device)
    for mine, piece in answer.pieces():
        for start in range(0, len(piece), buffers.rows):
            here = slice(start, start + buffers.rows)
            positions = mine[here].to(columns.device)
            found[positions] = _of_actions(piece.select(here), columns[positions], buffers)
    return found


def _answered(target: Target, columns: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    log_p = action_log_probs(target.distribution, columns, buffers)
    return log_p if target.offset is None else log_p + target.offset


def _of_actions(answer: Distribution, columns: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    if isinstance(answer, Sampled):
        return answer.log_probs.float()
    assert isinstance(answer, Categorical)
    return answer_log_probs(answer, buffers).gather(1, columns[:, None]).squeeze(1)


def chunk_rows(vocabulary: int) -> int:
    """Rows R of one chunk: one float32 buffer `[R, V]` takes about `CHUNK_BYTES`, within `SMALLEST_CHUNK` and 1024; of
    very large vocabularies at most `LARGEST_BUFFER`, in multiples of eight rows."""
    rows = max(SMALLEST_CHUNK, min(1024, CHUNK_BYTES // (4 * vocabulary)))
    return min(rows, max(8, LARGEST_BUFFER // (4 * vocabulary) // 8 * 8))


def memory_bound(
    comparison: Comparison, positions: int, width: int, vocabulary: int, rows: int | None = None, trained: bool = True
) -> int:
    """Bytes that `divergence_loss` allocates at most beyond its inputs, for float32 models and one teacher; `width` is
    the larger of both hidden widths."""
    rows = min(rows or chunk_rows(vocabulary), positions)
    buffers = 2 + comparison.buffers
    thin = positions * (4 * width + 64) + 16 * rows * width + 2**16
    return 4 * rows * vocabulary * buffers + thin + (4 * vocabulary * width if trained else 0)
