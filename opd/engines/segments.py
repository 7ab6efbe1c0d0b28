"""Rows that a server writes a segment at a time, so that somebody may look at them in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from opd.distributions import TopK
from opd.engines.base import Pending
from opd.language.engines.base import Drawing, Looker, Row, Written
from opd.remote.client import RequestError
from opd.remote.writing import Drawn

SEED = 2**63
"""Seeds are below it."""


class WritesTexts(Protocol):
    """Who asks a server for completions."""

    def ask_for(
        self, texts: Sequence[list[int]], budgets: Sequence[int], seeds: Sequence[int], drawing: Drawing, k: int
    ) -> list[Drawn | RequestError]:
        """One completion of each text, and the `k` likeliest ids at its states."""

    def row_of(self, found: Drawn | RequestError, drawing: Drawing) -> Row:
        """What was written as a row, `lost` where it cannot be used."""


class Segments:
    """Rows that are written a segment at a time, so that somebody may look at them in between and end some: each
    segment is a request that goes on from what was written, of which the server has kept the keys and values."""

    def __init__(self, writer: WritesTexts, asked: Pending, starts: Sequence[list[int]], looker: Looker):
        self.writer, self.asked, self.starts, self.looker = writer, asked, starts, looker
        count = len(starts)
        self.actions = [torch.zeros(0, dtype=torch.int64)] * count
        self.log_probs = [torch.zeros(0)] * count
        k = looker.candidates
        self.ids = [torch.zeros(0, k, dtype=torch.int64)] * count
        self.top = [torch.zeros(0, k)] * count
        self.finished, self.lost = [False] * count, [False] * count
        self.stopped: dict[int, str] = {}

    def rows(self) -> list[Row]:
        look, turn = self.looker.begin(self._seen()), 0
        while going := self._going():
            length = min(self.looker.segment, self.asked.budget - len(self.actions[going[0]]))
            texts = [self.starts[i] + self.actions[i].tolist() for i in going]
            # A row's segments have seeds of their own that follow from the row's.
            seeds = [(self.asked.seeds[i] + turn * 0x9E3779B97F4A7C15) % SEED for i in going]
            k = self.looker.candidates
            answers = self.writer.ask_for(texts, [length] * len(going), seeds, self.asked.drawing, k)
            for i, found in zip(going, answers, strict=True):
                self._take(i, found)
            turn += 1
            if self._going():
                self.stopped |= look.look(self._seen())
        look.end(self._seen())
        return [
            Row(actions, log_probs, finished, self.stopped.get(i), lost)
            for i, (actions, log_probs, finished, lost) in enumerate(
                zip(self.actions, self.log_probs, self.finished, self.lost, strict=True)
            )
        ]

    def _take(self, i: int, found: Drawn | RequestError) -> None:
        row = self.writer.row_of(found, self.asked.drawing)
        if row.lost:
            self.lost[i] = True
            return
        assert isinstance(found, Drawn)
        self.actions[i] = torch.cat([self.actions[i], found.actions])
        self.log_probs[i] = torch.cat([self.log_probs[i], found.log_probs])
        self.ids[i], self.top[i] = torch.cat([self.ids[i], found.ids]), torch.cat([self.top[i], found.top])
        self.finished[i] = found.finished

    def _going(self) -> list[int]:
        return [
            i
            for i in range(len(self.starts))
            if not (self.finished[i] or self.lost[i] or i in self.stopped) and len(self.actions[i]) < self.asked.budget
        ]

    def _seen(self) -> Written:
        candidates = [TopK(top, ids) for top, ids in zip(self.top, self.ids, strict=True)]
        rows = list(range(len(self.starts)))
        return Written(rows, self.actions, self.log_probs, self._going(), candidates if self.looker.candidates else ())
