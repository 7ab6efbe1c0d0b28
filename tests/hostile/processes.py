"""The processes below this one: which there are, and which a program left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path


def adopt_orphans() -> None:
    """Whatever this process started stays below it, also when what stood between has ended."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def processes() -> set[int]:
    """Numbers of the processes below this one; those that have ended are waited for or left out."""
    above: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                state, parent = Path("/proc", name, "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state not in "ZX":
                    above.setdefault(int(parent), []).append(int(name))
    found, now = set[int](), [os.getpid()]
    while now:
        now = [child for parent in now for child in above.get(parent, ())]
        found |= set(now)
    return found


def left_behind(before: set[int], seconds: float = 5.0) -> set[int]:
    """Processes that were not there before, once those that are being ended are gone."""
    until = time.monotonic() + seconds
    while (left := processes() - before) and time.monotonic() < until:
        time.sleep(0.02)
    return left
