"""Requests that wait together share a forward pass, in the one thread that runs the model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from opd.language.engines.in_process import InProcess


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


class Batcher:
    """Runs the model on what waits, first come first served. A request is never cut, and one of `batch` rows has its
    pass to itself: its numbers are then those of the same rows in any process.

    Args:
        batch: rows of one pass.
        waiting: rows that may wait.
    """

    def __init__(self, language: InProcess, batch: int, waiting: int):
        self.language, self.batch, self.most = language, batch, waiting
        self._queue: queue.SimpleQueue[Rows | None] = queue.SimpleQueue()
        self._held: Rows | None = None
        self._lock = threading.Lock()
        self._rows = 0
        self.passes = 0
        self._thread = threading.Thread(target=self._work, name="opd-model", daemon=True)
        self._thread.start()

    def submit(self, rows: Rows) -> Future[bytes]:
        """Take rows in.

        Raises:
            TooBusyError: too many wait.
        """
        with self._lock:
            if self._rows and self._rows + len(rows.contexts) > self.most:
                raise TooBusyError
            self._rows += len(rows.contexts)
        self._queue.put(rows)
        return rows.answer

    def close(self) -> None:
        """End the thread when what waits is done."""
        self._queue.put(None)

    def _work(self) -> None:
        while True:
            first = self._held or self._queue.get()
            self._held = None
            if first is None:
                return
            together, ended = self._joined(first)
            self._run(together)
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
            if count + len(following.contexts) > self.batch:
                self._held = following
                break
            together.append(following)
            count += len(following.contexts)
        return together, False

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
            try:
                rows.answer.set_result(rows.finish(mine))
            except Exception as error:
                rows.answer.set_exception(error)
