"""What a hostile program is, the limits that it runs under, and the names that are defined before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opd.sandbox import Limits

LIMITS = Limits(cpu_seconds=5, memory=256, output=1 << 16, files=2, entries=64, threads=24)
SHORT, LONG = 0.25, 1.5
"""Seconds for a program that nothing but time ends, and for the others."""


@dataclass(frozen=True)
class Hostile:
    """One program.

    Attributes:
        name: what it tries, as the docs say it.
        text: the program; names of `Outside.names` are defined before it, and `attempt(f, ...)` swallows what `f`
            raises.
        ends: reasons of which one must end it, where that is what contains it.
        tests: that it must not pass.
        control: a piece of the damage that it does when nothing confines it, where that harms nobody.
    """

    name: str
    text: str
    ends: frozenset[str] = frozenset()
    tests: tuple[str, ...] = ()
    control: str = ""

    @property
    def limits(self) -> Limits:
        return replace(LIMITS, seconds=SHORT if self.ends and self.ends <= timed() else LONG)


def timed(*also: str) -> frozenset[str]:
    return frozenset(("time", "cpu", *also))


PRELUDE = """
import ctypes, os, sys, time
def attempt(f, *a, **k):
    try:
        return f(*a, **k)
    except BaseException as error:
        return None
libc = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"
def call(x86, arm, *a):
    return libc.syscall(ctypes.c_long(arm if ARM else x86), *(ctypes.c_long(x) if isinstance(x, int) else x for x in a))
def mark(name="mark"):
    with open(FOLDER + "/" + name, "w") as file:
        file.write("here")
"""
