"""Projection of a chunk's hidden states by an output head into buffers that every chunk writes over."""

from __future__ import annotations

from dataclasses import replace

import torch

from opd.distributions import Aligned, Categorical, Common, Distribution, Head, Routed, Target
from opd.distributions.categorical import NOWHERE
from opd.errors import IncompatibleError

RAW, STUDENT, TEACHER, SCRATCH, SUM, KEPT = range(6)
"""Numbers of the buffers: logits before normalisation (scratch afterwards), each side's log-probabilities, more
scratch, and for several teachers the sum of gradients and the student's log-probabilities."""


class Buffers:
    """Float32 chunk buffers `[R, V]` by number, made when first asked for and reused by every chunk.

    On a CPU, fresh pages for every intermediate cost more than the arithmetic on them.
    """

    def __init__(self, rows: int, size: int, device: torch.device):
        self.rows, self.size, self.device = rows, size, device
        self.made: dict[int, torch.Tensor] = {}

    def get(self, number: int, rows: int) -> torch.Tensor:
        """The first `rows` rows of a buffer, holding whatever was written there last."""
        if number not in self.made:
            self.made[number] = torch.empty(self.rows, self.size, device=self.device)
        return self.made[number][:rows]


def project(rows: torch.Tensor, head: Head, buffers: Buffers, place: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 `[C, V]` log-probabilities of hidden states `[C, D]` in buffer `place`, and the slope of a soft cap, if
    any; `RAW` is written over."""
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


def answer_log_probs(full: Categorical, buffers: Buffers) -> torch.Tensor:
    """float32 `[C, V]`, a teacher's log-probabilities in its buffer."""
    dtype = full.head.weight.dtype
    return project(full.hidden.detach().to(dtype), full.head, buffers, TEACHER)[0]


def head_in(head: Head, dtype: torch.dtype) -> Head:
    """This head, detached, in the dtype that is computed in."""
    return replace(head, weight=head.weight.detach().to(dtype))


def answer_in(given: Distribution, dtype: torch.dtype) -> Distribution:
    """An answer whose heads are in the dtype that is computed in: cast once and not once a chunk."""
    if isinstance(given, Routed):
        return replace(given, parts=tuple(answer_in(part, dtype) for part in given.parts))
    if isinstance(given, Aligned):
        common = given.common
        if not isinstance(common, Common):
            return given
        return replace(given, common=replace(common, head=head_in(common.head, dtype)))
    return replace(given, head=head_in(given.head, dtype)) if isinstance(given, Categorical) else given


def check_same_ids(head: Head, target: Target) -> None:
    """Raise `IncompatibleError` when an answer is over other ids than the student's head: a column would be another
    token on either side."""
    given = target.distribution
    for part in given.parts if isinstance(given, Routed) else (given,):
        if not isinstance(part, Categorical):
            continue
        theirs, ours = part.vocabulary, head.vocabulary
        if (theirs.ids, theirs.excluded, part.head.size) != (ours.ids, ours.excluded, head.size):
            who = "a teacher" if target.teacher is None else f"teacher {target.teacher!r}"
            raise IncompatibleError(
                f"{who} answers over {theirs} ({part.head.size} columns) and the student is over {ours} "
                f"({head.size}): give both the run's one vocabulary"
            )
