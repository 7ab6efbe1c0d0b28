"""Blocks at anchors in texts that are written already, a batch of texts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from opd.drafting.anchors import shuffled, uniform, walked
from opd.drafting.decoding import Answer, Speculation
from opd.drafting.record import Drafted
from opd.drafting.texts import Texts

Anchors = Literal["verified", "random", "uniform", "every"]
Slots = Literal["drafter", "text"]
Moved = Literal["accepted", "both"]
Stream = Literal["both", "accepted", "rejected"]
"""What is learnt of a block: everything, what was accepted and corrected of a segment, or what was rejected."""


@dataclass(frozen=True)
class Rule:
    """Where blocks begin and what stands in them, as `opd.rollouts.anchored.AnchoredRollout` says it; `per_text` is 0
    where the rule has a number of its own."""

    anchors: Anchors
    per_text: int
    slots: Slots
    moved: Moved


@dataclass(frozen=True)
class Text:
    """A prompt, int64 `[P]`, and a response, int64 `[T]`, that its target wrote; `seed` is of its random anchors."""

    prompt: torch.Tensor
    response: torch.Tensor
    finished: bool
    seed: int

    @property
    def places(self) -> int:
        """How many of its tokens can be an anchor."""
        return len(self.response) - 1


@dataclass(frozen=True)
class Placed:
    """A text with its M blocks. `streams` are what is learnt of each, `of_text` bool `[M]` which hold the text's own
    tokens."""

    answer: Answer
    streams: list[Stream]
    of_text: torch.Tensor


@dataclass(frozen=True)
class _Blocks:
    """Blocks in B texts, M in each, of which the first `len(places[i])` are text i's.

    Attributes:
        places: B lists of anchors, counted from the first token of the response.
        tokens, hidden, log_q: `[B, M, K]`, `[B, M, K, D]` and `[B, M, K]`.
        accepted, committed: int64 `[B, M]`.
        of_text: whether they hold the text's own tokens.
        steps: whether they are steps of verifying.
        stream: what is learnt of them.
    """

    places: list[list[int]]
    tokens: torch.Tensor
    hidden: torch.Tensor
    log_q: torch.Tensor
    accepted: torch.Tensor
    committed: torch.Tensor
    of_text: bool
    steps: bool = False
    stream: Stream = "both"


def place(rule: Rule, how: Speculation, texts: Sequence[Text]) -> list[Placed]:
    """Each text with its blocks; one of a single token has none.

    Args:
        how: who proposes and teaches, and how many tokens; the drafter is in eval mode.
    """
    walks = rule.anchors == "verified" or (rule.anchors == "random" and rule.moved == "accepted")
    found = [_without_blocks(how, text, walks and rule.slots == "drafter") for text in texts]
    which = [i for i, text in enumerate(texts) if text.places > 0]
    if which:
        for i, made in zip(which, _Placing(rule, how, [texts[i] for i in which]).placed(), strict=True):
            found[i] = made
    return found


def _without_blocks(how: Speculation, text: Text, walked: bool) -> Placed:
    none, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    width, dtype = how.target.outline.width, next(how.target.language.parameters()).dtype
    features = torch.zeros(0, len(how.target.taps) * width, dtype=dtype)
    record = Drafted(text.prompt, text.response, features, none, none, none, steps=None if walked else none.bool())
    hidden = torch.zeros(0, width, dtype=dtype, device=how.target.language.device)
    return Placed(Answer(record, nothing, text.finished, none, nothing, nothing, hidden), [], none.bool())


class _Placing:
    """Some texts of two tokens or more."""

    def __init__(self, rule: Rule, how: Speculation, rows: Sequence[Text]):
        self.rule, self.how, self.rows = rule, how, rows
        self.device = how.target.language.device
        self.texts = Texts.read(how.target, [torch.cat([row.prompt, row.response]) for row in rows])
        self.first = torch.tensor([len(row.prompt) for row in rows], device=self.device)[:, None]
        self.places = torch.tensor([row.places for row in rows], device=self.device)[:, None]
        self.everywhere: tuple[torch.Tensor, torch.Tensor] | None = None

    def placed(self) -> list[Placed]:
        parts = self._parts()
        return [self._of_row(i, row, parts) for i, row in enumerate(self.rows)]

    def _parts(self) -> list[_Blocks]:
        rule, rows = self.rule, self.rows
        if rule.anchors in ("verified", "random"):
            return self._along_the_walk()
        if rule.anchors == "every":
            places = [list(range(row.places)) for row in rows]
        else:
            places = [uniform(row.places, rule.per_text, _generator(row)) for row in rows]
        return [self._of_text(places) if rule.slots == "text" else self._of_drafter(places)]

    def _along_the_walk(self) -> list[_Blocks]:
        rule, rows, count = self.rule, self.rows, self.how.proposals
        every = torch.arange(int(self.places.max()), device=self.device).minimum(self.places - 1)
        self.everywhere = self.texts.proposed(self.how.drafter, self.how.drafts, self.first + every, count)
        agreed = self._agreed(every, self.everywhere[0]).tolist()
        steps = [walked(row[: text.places]) for row, text in zip(agreed, rows, strict=True)]
        if rule.anchors == "verified":
            return [self._of_text(steps) if rule.slots == "text" else self._of_drafter(steps, steps=True)]
        stood = [[row[at] for at in taken] for row, taken in zip(agreed, steps, strict=True)]
        # A segment is what stood and the token by which the target corrected it, as far as slots and text go.
        sizes = [
            [min(r + 1, count, text.places - at) for at, r in zip(taken, of_row, strict=True)]
            for taken, of_row, text in zip(steps, stood, rows, strict=True)
        ]
        found = [shuffled(of_row, text.places, _generator(text)) for of_row, text in zip(sizes, rows, strict=True)]
        places = [anchors for anchors, _ in found]
        if rule.slots == "text":
            return [self._of_text(places)]
        if rule.moved == "both":
            return [self._of_drafter(places)]
        orders = [order for _, order in found]
        segments = [self._table(_in_order(each, orders)) for each in (stood, sizes)]
        moved = self._of_text(places, stream="accepted", accepted=segments[0], committed=segments[1])
        return [moved, self._of_drafter(steps, steps=True, stream="rejected")]

    def _of_text(
        self,
        places: list[list[int]],
        stream: Stream = "both",
        accepted: torch.Tensor | None = None,
        committed: torch.Tensor | None = None,
    ) -> _Blocks:
        """With the text's own tokens, all accepted as far as the text goes unless it is said otherwise."""
        at, count = self._table(places), self.how.proposals
        tokens = self.texts.own(self.first + at, count)
        held = (self.places - at).clamp(max=count)
        return _Blocks(
            places,
            tokens,
            self.texts.taught(self.first + at, count),
            torch.zeros(tokens.shape, device=self.device),
            held if accepted is None else accepted,
            held if committed is None else committed,
            of_text=True,
            stream=stream,
        )

    def _of_drafter(self, places: list[list[int]], steps: bool = False, stream: Stream = "both") -> _Blocks:
        """With the drafter's proposals, accepted as far as they are the text's tokens."""
        at, count = self._table(places), self.how.proposals
        if self.everywhere is None:
            tokens, log_q = self.texts.proposed(self.how.drafter, self.how.drafts, self.first + at, count)
        else:
            tokens, log_q = (x.gather(1, at[:, :, None].expand(-1, -1, count)) for x in self.everywhere)
        accepted = self._agreed(at, tokens)
        hidden = self.texts.judged(self.first + at, tokens)
        committed = (accepted + 1).minimum(self.places - at)
        return _Blocks(places, tokens, hidden, log_q, accepted, committed, of_text=False, steps=steps, stream=stream)

    def _agreed(self, at: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[B, M]`: how many of int64 `[B, M, K]` proposals at int64 `[B, M]` places are the text's next
        tokens."""
        count = tokens.shape[2]
        held = at[:, :, None] + torch.arange(1, count + 1, device=self.device) <= self.places[:, :, None]
        return ((tokens == self.texts.own(self.first + at, count)) & held).long().cumprod(2).sum(2)

    def _table(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """int64 `[B, M]` of B lists; 0 behind the end of one."""
        most = max(len(row) for row in rows)
        return torch.tensor([[*row, *[0] * (most - len(row))] for row in rows], device=self.device)

    def _of_row(self, i: int, row: Text, parts: Sequence[_Blocks]) -> Placed:
        counts = [len(part.places[i]) for part in parts]

        def of_slots(name: str) -> torch.Tensor:
            found = [getattr(part, name)[i, :n].flatten(0, 1) for part, n in zip(parts, counts, strict=True)]
            return torch.cat(found)

        def of_blocks(name: str) -> torch.Tensor:
            return torch.cat([getattr(part, name)[i, :n] for part, n in zip(parts, counts, strict=True)]).cpu()

        anchors = torch.tensor([len(row.prompt) + at for part in parts for at in part.places[i]])
        steps, of_text = (
            torch.tensor([getattr(part, name) for part, n in zip(parts, counts, strict=True) for _ in range(n)])
            for name in ("steps", "of_text")
        )
        features = self.texts.features[i, : int(anchors.max())]
        counts_of_blocks = of_blocks("accepted"), of_blocks("committed")
        record = Drafted(row.prompt, row.response, features, anchors, *counts_of_blocks, steps=steps)
        log_q = of_slots("log_q").cpu()
        tokens, hidden = of_slots("tokens").cpu(), of_slots("hidden")
        streams = [part.stream for part, n in zip(parts, counts, strict=True) for _ in range(n)]
        # Whether proposed or taken from the text, nothing was drawn.
        answer = Answer(record, torch.zeros(0), row.finished, tokens, log_q, torch.zeros_like(log_q), hidden)
        return Placed(answer, streams, of_text)


def _generator(row: Text) -> torch.Generator:
    return torch.Generator().manual_seed(row.seed)


def _in_order(rows: Sequence[Sequence[int]], orders: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[row[i] for i in order] for row, order in zip(rows, orders, strict=True)]
