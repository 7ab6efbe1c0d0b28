"""Spans: the smallest pieces of a text that begin and end with a token of two tokenizers, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch

from opd.distributions.base import Distribution


class Span(NamedTuple):
    """The same bytes on both sides: tokens `start` to `stop` (not included) of the student's completion, and `first` to
    `last` (not included) of the teacher's."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def single(self) -> bool:
        """Whether it is one token on both sides."""
        return self.stop - self.start == 1 and self.last - self.first == 1


def spans_of(ours: Sequence[int], theirs: Sequence[int]) -> list[Span]:
    """The spans between positions at which both sides have a boundary, none of them divisible.

    Args:
        ours, theirs: bytes of each token, one after the other. Where one side ends before the other, what is left has
            no counterpart.
    """
    spans = []
    i = j = start = first = 0
    mine = other = 0
    while i < len(ours) or j < len(theirs):
        if mine <= other and i < len(ours):
            mine, i = mine + ours[i], i + 1
        elif mine > other and j < len(theirs):
            other, j = other + theirs[j], j + 1
        elif mine == other and i == len(ours):
            # Only tokens without bytes can be left here.
            other, j = other + theirs[j], j + 1
        else:
            break
        if mine == other and i > start and j > first:
            spans.append(Span(start, i, first, j))
            start, first = i, j
    return spans


@dataclass(frozen=True)
class Spans(Distribution):
    """Log-probabilities of what was drawn, span by span: the smallest pieces of a completion that begin and end with a
    token of both tokenizers. A span's is the sum over the teacher's own tokens of it, each given those before.

    Positions of a trajectory stay together and in order wherever spans are read.

    Attributes:
        log_probs: float32 `[N]`, of the span that begins at a position; 0 elsewhere.
        begins: bool `[N]`, where a span begins.
        compared: bool `[N]`, positions within a span; others have no counterpart in the teacher's tokens.
        single: bool `[N]`, positions of spans that are one token on both sides.
    """

    kind: ClassVar[str] = "spans"
    log_probs: torch.Tensor
    begins: torch.Tensor
    compared: torch.Tensor
    single: torch.Tensor

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    def select(self, index: slice | torch.Tensor) -> Self:
        return type(self)(*(each[index] for each in vars(self).values()))

    def detach(self) -> Self:
        return self

    def owners(self) -> torch.Tensor:
        """int64 `[N]`: the number of each position's span, from 0; -1 outside of spans."""
        return torch.where(self.compared, self.begins.long().cumsum(0) - 1, -1)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """float32 `[P]`: sums of `[N]` numbers over each of the P spans."""
        owners = self.owners()
        total = torch.zeros(int(self.begins.sum()), device=values.device, dtype=values.dtype)
        return total.index_add_(0, owners[self.compared], values[self.compared])
