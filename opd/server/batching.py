"""Requests that wait together share a forward pass or are written side by side, in the one thread that runs the
model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from opd.context import Context
from opd.distributions import TopK
from opd.language.engines.base import Drawing, Look, Looker, Row, Written
from opd.language.engines.in_process import InProcess
from opd.language.tokens import Tokens

MOMENT = 0.005
"""Seconds for which a row that is to be written waits for another one."""


class TooBusyError(Exception):
    """More rows wait already than a server keeps."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one request, and what makes the answer's bytes of their hidden states, `[T, D]` of each row. Two
    requests of the same rows are two."""

    contexts: Sequence[torch.Tensor]
    completions: Sequence[torch.Tensor]
    finish: Callable[[Sequence[torch.Tensor]], bytes]
    answer: Future[bytes] = field(default_factory=Future)


@dataclass(frozen=True)
class Manner:
    """How rows are written; those of one manner are written side by side.

    Attributes:
        budget: most tokens of one.
        temperature, top_p, top_k: as `Drawing` has them.
        end_ids: ids that end a row.
        candidates: likeliest ids of each state that are kept.
    """

    budget: int
    temperature: float
    top_p: float
    top_k: int
    end_ids: tuple[int, ...]
    candidates: int


@dataclass(frozen=True, eq=False)
class Writing:
    """A completion of one prompt that is to be written, and what makes the answer's bytes of it."""

    context: torch.Tensor
    seed: int
    manner: Manner
    finish: Callable[[Row, TopK | None], bytes]
    answer: Future[bytes] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class Task:
    """Something else that the model's thread does between passes."""

    work: Callable[[], bytes]
    answer: Future[bytes] = field(default_factory=Future)


Item = Rows | Writing | Task


class Kept(Looker, Look):
    """Who looks at rows that are written, once, to keep the likeliest ids of their states."""

    def __init__(self, segment: int, candidates: int):
        self.segment, self.candidates = segment, candidates
        self.found: dict[int, TopK] = {}

    def begin(self, written: Written) -> Look:
        return self

    def look(self, written: Written) -> Mapping[int, str]:
        return {}

    def end(self, written: Written) -> None:
        self.found |= dict(zip(written.rows, written.candidates, strict=True))


class Batcher:
    """Runs the model on what waits, first come first served. A request is never cut, and one of `batch` rows has its
    pass to itself: its numbers are then those of the same rows in any process.

    Args:
        batch: rows of one pass.
        waiting: rows that may wait.
        rows_written: rows that are written side by side.
    """

    def __init__(self, language: InProcess, batch: int, waiting: int, rows_written: int = 64):
        self.language, self.batch, self.most, self.rows_written = language, batch, waiting, rows_written
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._held: Item | None = None
        self._lock = threading.Lock()
        self._rows = 0
        self.passes = 0
        self._thread = threading.Thread(target=self._work, name="opd-model", daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> Future[bytes]:
        """Take rows in, or a task.

        Raises:
            TooBusyError: too many wait.
        """
        with self._lock:
            if self._rows and self._rows + _count(item) > self.most:
                raise TooBusyError
            self._rows += _count(item)
        self._queue.put(item)
        return item.answer

    def close(self) -> None:
        """End the thread when what waits is done."""
        self._queue.put(None)

    def _work(self) -> None:
        while True:
            first = self._held or self._queue.get()
            self._held = None
            if first is None:
                return
            if isinstance(first, Rows):
                together, ended = self._joined(first)
                self._run(together)
            elif isinstance(first, Writing):
                beside, ended = self._beside(first)
                self._write(beside)
            else:
                ended = False
                self._do(first)
            if ended:
                return

    def _joined(self, first: Rows) -> tuple[list[Rows], bool]:
        """What shares the next pass, and whether the end was asked for."""
        together, count = [first], len(first.contexts)
        while count < self.batch:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                return together, True
            if not isinstance(following, Rows) or count + len(following.contexts) > self.batch:
                self._held = following
                break
            together.append(following)
            count += len(following.contexts)
        return together, False

    def _beside(self, first: Writing) -> tuple[list[Writing], bool]:
        """What is written side by side, and whether the end was asked for. Rows of one rollout come as requests of
        their own, one soon after the other: one that waits a moment for the next is worth a whole batch."""
        together = [first]
        while len(together) < self.rows_written:
            try:
                following = self._queue.get(timeout=MOMENT)
            except queue.Empty:
                break
            if following is None:
                return together, True
            if not isinstance(following, Writing) or following.manner != first.manner:
                self._held = following
                break
            together.append(following)
        return together, False

    @torch.no_grad()
    def _write(self, together: Sequence[Writing]) -> None:
        with self._lock:
            self._rows -= len(together)
        wanted = [each for each in together if each.answer.set_running_or_notify_cancel()]
        if not wanted:
            return
        manner = wanted[0].manner
        context = Context(self.language.device, temperature=manner.temperature, agreed=Tokens(end_ids=manner.end_ids))
        drawing = Drawing(context, manner.top_p, manner.top_k, batch=self.rows_written)
        kept = Kept(manner.budget, manner.candidates) if manner.candidates else None
        try:
            rows = self.language.sample(
                [each.context for each in wanted], 1, manner.budget, [each.seed for each in wanted], drawing, kept
            )
            self.passes += 1
        except Exception as error:
            for each in wanted:
                each.answer.set_exception(error)
            return
        for i, (each, row) in enumerate(zip(wanted, rows, strict=True)):
            self._finish(each.answer, partial(each.finish, row, None if kept is None else kept.found[i]))

    def _do(self, task: Task) -> None:
        with self._lock:
            self._rows -= _count(task)
        if task.answer.set_running_or_notify_cancel():
            self._finish(task.answer, task.work)

    @staticmethod
    def _finish(answer: Future[bytes], work: Callable[[], bytes]) -> None:
        try:
            answer.set_result(work())
        except Exception as error:
            answer.set_exception(error)

    @torch.no_grad()
    def _run(self, together: Sequence[Rows]) -> None:
        contexts = [context for rows in together for context in rows.contexts]
        completions = [completion for rows in together for completion in rows.completions]
        with self._lock:
            self._rows -= len(contexts)
        # Who asked may have gone meanwhile.
        wanted = [rows for rows in together if rows.answer.set_running_or_notify_cancel()]
        try:
            hidden = torch.split(self.language(contexts, completions), [len(each) for each in completions])
            self.passes += 1
        except Exception as error:
            for rows in wanted:
                rows.answer.set_exception(error)
            return
        done = 0
        for rows in together:
            mine, done = hidden[done : done + len(rows.contexts)], done + len(rows.contexts)
            if rows not in wanted:
                continue
            self._finish(rows.answer, partial(rows.finish, mine))


def _count(item: Item) -> int:
    """Rows that it has."""
    return len(item.contexts) if isinstance(item, Rows) else 1
