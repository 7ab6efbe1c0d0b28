"""Which confinement this machine has: each is tried once with a program that must fail at all that it tries."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

from opd.errors import RecipeError, RunError
from opd.sandbox.base import Confinement, Limits
from opd.sandbox.bubblewrap import Bubblewrap
from opd.sandbox.landlock import Landlock
from opd.sandbox.nothing import Nothing
from opd.sandbox.running import Sandbox
from opd.sandbox.seccomp import Seccomp

BEST_FIRST: tuple[type[Confinement], ...] = (Bubblewrap, Landlock, Seccomp)
"""Those that confine."""
BY_KIND: dict[str, type[Confinement]] = {Nothing.kind: Nothing} | {each.kind: each for each in BEST_FIRST}

PROBE = """
import ctypes, os

libc = ctypes.CDLL(None, use_errno=True)

def make_socket():
    if libc.socket(2, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "socket")

def denied(attempt):
    try:
        attempt()
    except OSError:
        return True
    return False

attempts = {{
    "start a process": lambda: os.fork() or os._exit(0),
    "open a socket": make_socket,
    "read a file": lambda: open({witness!r}).read(),
    "write a file": lambda: open({new!r}, "w"),
    "list a folder": lambda: os.listdir({folder!r}),
    "signal its parent": lambda: os.kill(os.getppid(), 0),
}}
print(*(name for name, attempt in attempts.items() if not denied(attempt)), sep=", ")
"""


@functools.cache
def why_not(kind: str) -> str | None:
    """Why a confinement cannot be had on this machine; None where it works, which was seen."""
    confinement = BY_KIND[kind]()
    lacking = confinement.missing()
    if lacking is not None or not confinement.confines:
        return lacking
    try:
        with tempfile.TemporaryDirectory(prefix="opd-witness-") as folder:
            witness = Path(folder, "witness")
            witness.write_text("secret")
            program = PROBE.format(witness=str(witness), new=str(Path(folder, "new")), folder=folder)
            ran = Sandbox(confinement).run(program, limits=Limits(seconds=20))
    except RunError as error:
        return str(error)
    except OSError as error:
        return f"no folder for temporary files ({error.strerror}); set TMPDIR to one that can be written"
    if ran.ended != "finished":
        last = (ran.stderr.strip().splitlines() or [ran.ended])[-1]
        return f"the program that tries it did not run ({last})"
    return None if ran.stdout == "\n" else f"a program can {ran.stdout.strip()}"


def sandbox(confinement: str = "best") -> tuple[Sandbox, list[str]]:
    """A sandbox of a kind, or the best that this machine has but `none`, and lines that say which and why no better.

    Raises:
        RecipeError: this machine has none, or not the one that was asked for.
    """
    if confinement == "none":
        lacking = why_not("none")
        if lacking is not None:
            raise RecipeError(f"confinement is 'none', which {lacking}")
        line = "confinement 'none': programs that a model wrote run with your own rights; see docs/sandbox.md"
        return Sandbox(Nothing()), [line]
    wanted = [each.kind for each in BEST_FIRST] if confinement == "best" else [confinement]
    lacking_of: dict[str, str] = {}
    for kind in wanted:
        reason = why_not(kind)
        if reason is None:
            better = "".join(f"; not {name}: {why}" for name, why in lacking_of.items())
            return Sandbox(BY_KIND[kind]()), [f"programs are confined by {kind}{better}"]
        lacking_of[kind] = reason
    reasons = "; ".join(f"{name}: {why}" for name, why in lacking_of.items())
    system = "" if sys.platform == "linux" else f" on {sys.platform}"
    raise RecipeError(
        f"confinement {confinement!r} cannot be had here{system} ({reasons}); use Linux with bubblewrap, or "
        "confinement: none for programs that you trust"
    )
