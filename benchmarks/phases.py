"""CPU and wall seconds by phase, for code that is not ours to edit."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

REST = "rest"
"""What lies in no phase: data loading, callbacks, logging."""

WHOLE = "rollout"
"""A phase that nothing interrupts: a model called while sampling is still sampling."""


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given: its work goes on behind the calls that ask for it."""
    if device == "cuda":
        torch.cuda.synchronize()


def over(amount: float, seconds: float) -> float:
    """`amount` over `seconds`, or NaN where the clock showed none: a process's clock may advance by whole ticks of ten
    milliseconds, and a phase may be shorter."""
    return amount / seconds if seconds > 0 else math.nan


class Phases:
    """Stop watches, of which one runs at a time: a phase inside another stops that one meanwhile."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.stack = device, [REST]
        self.restart()

    def restart(self) -> None:
        """Forget everything; from now on time counts."""
        self.seconds: dict[str, list[float]] = {}
        synchronise(self.device)
        self.since = _now()

    def take(self) -> dict[str, dict[str, float]]:
        """`{"cpu": {phase: seconds}, "wall": {...}}` since the last restart."""
        self._charge()
        return {clock: {phase: s[i] for phase, s in self.seconds.items()} for i, clock in enumerate(("cpu", "wall"))}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if WHOLE in self.stack:
            yield
            return
        self._charge()
        self.stack.append(phase)
        try:
            yield
        finally:
            self._charge()
            self.stack.pop()

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Time every call of `owner.name` from now on."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    def _charge(self) -> None:
        synchronise(self.device)
        now = _now()
        spent = self.seconds.setdefault(self.stack[-1], [0.0, 0.0])
        for i in (0, 1):
            spent[i] += now[i] - self.since[i]
        self.since = now


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()
