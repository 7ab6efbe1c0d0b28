"""`Aligned`: what a teacher of another tokenizer says at a student's positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from opd.distributions.base import Distribution
from opd.distributions.categorical import Categorical, Head
from opd.distributions.routed import Routed
from opd.distributions.sampled import Sampled
from opd.distributions.spans import Spans
from opd.distributions.top_k import TopK

NEVER = -1e9
"""Log-probability that stands for an entry that is none: on both sides of a comparison it adds exactly 0."""


@dataclass(frozen=True)
class Common(Distribution):
    """E distributions over the tokens that two tokenizers have in common, with the rest as one bucket.

    Attributes:
        answer: the teacher's own `[E]` distributions, over all of its ids.
        head: its head with the rows of the K common tokens alone, in the order of `columns`.
        log_norm: float32 `[E]`, logarithm of the sum over all ids of the teacher, by which the logits of `head` become
            log-probabilities.
        columns: int64 `[K]`, the student's columns of the common tokens, ascending.
        complete: whether neither side has another token, so that there is no rest.
    """

    kind: ClassVar[str] = "common"
    answer: Categorical
    head: Head
    log_norm: torch.Tensor
    columns: torch.Tensor
    complete: bool

    def __len__(self) -> int:
        return len(self.answer)

    def select(self, index: slice | torch.Tensor) -> Self:
        return replace(self, answer=self.answer.select(index), log_norm=self.log_norm[index])

    def detach(self) -> Self:
        return self

    def known(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 `[E, K]` log-probabilities, normalised over all of the teacher's ids, and the int64 `[E, K]` columns
        that they belong to (one row, seen E times). For a chunk's rows."""
        log_probs = self.head.logits(self.answer.hidden) - self.log_norm[:, None]
        return log_probs, self.columns.expand(len(self), -1)


@dataclass(frozen=True)
class Listed(Distribution):
    """E distributions of which the teacher told some ids: K at most of them are common tokens, all others are the rest.

    Attributes:
        log_probs: float32 `[E, K]`; `NEVER` where an entry is none.
        columns: int64 `[E, K]`, the student's; 0 where an entry is none.
    """

    kind: ClassVar[str] = "listed"
    log_probs: torch.Tensor
    columns: torch.Tensor
    complete: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.log_probs)

    def select(self, index: slice | torch.Tensor) -> Self:
        return type(self)(self.log_probs[index], self.columns[index])

    def detach(self) -> Self:
        return self

    def known(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Common.known`."""
        return self.log_probs, self.columns


@dataclass(frozen=True)
class Told(Distribution):
    """What a server says at once: its likeliest ids at each of N positions, and how likely the token was that stands
    there."""

    kind: ClassVar[str] = "told"
    top: TopK
    drawn: Sampled

    def __len__(self) -> int:
        return len(self.top)

    def select(self, index: slice | torch.Tensor) -> Self:
        return type(self)(self.top.select(index), self.drawn.select(index))

    def detach(self) -> Self:
        return self


@dataclass(frozen=True)
class Aligned(Distribution):
    """What a teacher of another tokenizer says: log-probabilities of spans, and distributions over the common tokens
    where a span is one token on both sides.

    Attributes:
        spans: `[N]`.
        places: int64 `[N]`, which of the E distributions stands at a position; -1 where there is none.
        common: `[E]`, `Common` or `Listed`.
    """

    kind: ClassVar[str] = "aligned"
    spans: Spans
    places: torch.Tensor
    common: Common | Listed

    def __len__(self) -> int:
        return self.places.shape[0]

    def select(self, index: slice | torch.Tensor) -> Self:
        return replace(self, spans=self.spans.select(index), places=self.places[index])

    def detach(self) -> Self:
        return self

    @property
    def log_probs(self) -> torch.Tensor:
        """float32 `[N]`, as of `Spans`."""
        return self.spans.log_probs

    @property
    def compared(self) -> torch.Tensor:
        """bool `[N]`: where distributions can be compared."""
        return self.places >= 0

    def here(self) -> Common | Listed:
        """The `[N]` distributions, where every position has one."""
        return self.common.select(self.places)


def spans_in(answer: Distribution) -> Spans | None:
    """The spans of an answer at N positions; None of one over the student's own ids."""
    if isinstance(answer, Aligned):
        return answer.spans
    if isinstance(answer, Spans):
        return answer
    if not isinstance(answer, Routed) or not isinstance(answer.parts[0], Aligned | Spans):
        return None
    pieces = [(mine, spans) for mine, piece in answer.pieces() if (spans := spans_in(piece)) is not None]
    order = torch.cat([mine for mine, _ in pieces]).argsort()
    fields = zip(*(vars(spans).values() for _, spans in pieces), strict=True)
    return Spans(*(torch.cat(each)[order.to(each[0].device)] for each in fields))


def compared_in(answer: Distribution) -> torch.Tensor | None:
    """bool `[N]`: where an answer has a distribution; None of one that has one everywhere."""
    if isinstance(answer, Aligned):
        return answer.compared
    if isinstance(answer, Spans):
        return torch.zeros_like(answer.compared)
    if not isinstance(answer, Routed) or not isinstance(answer.parts[0], Aligned | Spans):
        return None
    whole = torch.zeros(len(answer), dtype=torch.bool, device=answer.owners.device)
    for mine, piece in answer.pieces():
        found = compared_in(piece)
        assert found is not None
        whole[mine.to(whole.device)] = found.to(whole.device)
    return whole
