"""How a person follows a run: a bar on a terminal, a line now and then in a log file; and nobody else's bars."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from huggingface_hub import utils as hub
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers.utils import logging as transformers_logging

SILENCE = 30.0
"""Seconds after which a log file gets a line in any case."""

MARKS = 10
"""Equal parts of a run whose ends get a line each."""


def shows_bars(console: Console) -> bool:
    """Whether what is printed can be written over: on a terminal or in a notebook, and not in a log file."""
    return console.is_interactive or console.is_jupyter


class Bar:
    """The steps of a run as a bar that moves."""

    def __init__(self, console: Console, step: int, steps: int):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._progress.start()
        self._task = self._progress.add_task("training", total=steps, completed=step, numbers="")

    def update(self, step: int, numbers: str) -> None:
        self._progress.update(self._task, completed=step, numbers=numbers)

    def stop(self) -> None:
        self._progress.stop()


class Lines:
    """The steps of a run as lines: of its first step here, of the last one, at the end of each tenth, and after half a
    minute without a line.

    Args:
        clock: seconds of any origin.
        what: one of the steps is.
    """

    def __init__(
        self,
        console: Console,
        step: int,
        steps: int,
        clock: Callable[[], float] = time.monotonic,
        what: str = "step",
    ):
        self._console, self._first, self._steps, self._clock, self._what = console, step, steps, clock, what
        self._shown, self._began = step, clock()
        self._spoke = self._began

    def update(self, step: int, numbers: str) -> None:
        now = self._clock()
        marked = step * MARKS // self._steps > self._shown * MARKS // self._steps
        if not (self._shown == self._first or marked or step == self._steps or now - self._spoke >= SILENCE):
            return
        self._shown, self._spoke = step, now
        left = (now - self._began) / max(1, step - self._first) * (self._steps - step)
        parts = (f"{self._what} {step}/{self._steps}", numbers, f"left {timedelta(seconds=round(left))}")
        text = "  ".join(part for part in parts if part)
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing is left open."""


class Nothing:
    """Of a quiet run, and of all processes but the main one."""

    def update(self, step: int, numbers: str) -> None:
        """Nobody looks."""

    def stop(self) -> None:
        """Nobody looks."""


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Turn off the bars of transformers, datasets and huggingface_hub, which fight with the run's own on a terminal and
    fill a log file; afterwards they are as they were."""
    before = {(hub.disable_progress_bars, hub.enable_progress_bars): hub.are_progress_bars_disabled()}
    # Imported here it would slow every start and leave a thread, which a process that forks must not have.
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        off_and_on = (datasets.disable_progress_bars, datasets.enable_progress_bars)
        before[off_and_on] = datasets.are_progress_bars_disabled()
    # transformers' switch turns the hub's too, so it goes first on the way back.
    transformers_on = transformers_logging.is_progress_bar_enabled()
    with _unheard():
        transformers_logging.disable_progress_bar()
        for off, _ in before:
            off()
    try:
        yield
    finally:
        with _unheard():
            if transformers_on:
                transformers_logging.enable_progress_bar()
            for (off, on), disabled in before.items():
                (off if disabled else on)()


@contextmanager
def _unheard() -> Iterator[None]:
    """Where the user's environment decides about bars, the libraries warn that it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
