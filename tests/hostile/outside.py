"""What a hostile program could harm, set up and looked at from outside: files, sockets, signals, processes, memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from opd.sandbox import Ran, Sandbox
from tests.hostile.processes import adopt_orphans, left_behind, processes
from tests.hostile.program import PRELUDE, Hostile

SLACK = 4.0
"""Seconds behind its limit after which a program must be gone, on a busy machine and with the start of Python."""
GROWN = 64 << 20
"""Bytes by which our own memory may grow meanwhile."""

NEIGHBOUR = """
import signal, sys, time
signal.signal(signal.SIGURG, lambda *a: sys.exit(77))
print('up', flush=True)
time.sleep(600)
"""


class Outside:
    """What a program could harm: files in `folder`, listeners, and a process that has nothing to do with it."""

    def __init__(self, folder: Path):
        self.folder, self.secret, self.mark = folder, secrets.token_hex(8), f"mark-{secrets.token_hex(8)}"
        adopt_orphans()
        self.temp = folder / "temp"
        self.temp.mkdir()
        self.inner = folder / "caller"
        self.listeners = {
            "TCP": socket.create_server(("127.0.0.1", 0)),
            "UDP": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "Unix": socket.socket(socket.AF_UNIX),
            "abstract": socket.socket(socket.AF_UNIX),
        }
        self.abstract = secrets.token_hex(8)
        self.listeners["UDP"].bind(("127.0.0.1", 0))
        self.listeners["Unix"].bind(str(folder / "socket"))
        self.listeners["abstract"].bind("\0" + self.abstract)
        for name, listener in self.listeners.items():
            listener.setblocking(False)
            if name in ("Unix", "abstract"):
                listener.listen()
        self.signals = 0
        self.handled = signal.signal(signal.SIGURG, self._signalled)
        self.neighbour: subprocess.Popen[str] | None = None

    def _signalled(self, *_: object) -> None:
        self.signals += 1

    def close(self) -> None:
        signal.signal(signal.SIGURG, self.handled)
        for listener in self.listeners.values():
            listener.close()
        self._end_neighbour()

    def _end_neighbour(self) -> None:
        if self.neighbour is not None:
            self.neighbour.kill()
            self.neighbour.wait()
            assert self.neighbour.stdout is not None
            self.neighbour.stdout.close()

    def _prepare(self) -> None:
        if self.inner.exists():
            for path in self.inner.iterdir():
                path.unlink()
        self.inner.mkdir(exist_ok=True)
        (self.inner / "witness").write_text("unchanged")
        (self.inner / "witness").chmod(0o644)
        (self.inner / "secret").write_text(self.secret)
        if self.neighbour is None or self._neighbour() != self.before:
            self._end_neighbour()
            self.neighbour = subprocess.Popen(
                [sys.executable, "-c", NEIGHBOUR, self.secret],
                env={"SECRET": self.secret},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            assert self.neighbour.stdout is not None
            self.neighbour.stdout.readline()
            self.before = self._neighbour()

    def _neighbour(self) -> tuple[object, ...]:
        """That it lives, signals on their way to it, whether it is stopped, traced or reniced, and its limits."""
        assert self.neighbour is not None
        if self.neighbour.poll() is not None:
            return ("dead",)
        here = Path("/proc", str(self.neighbour.pid))
        stat = (here / "stat").read_text().rsplit(")", 1)[1].split()
        pending = [line for line in (here / "status").read_text().splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
        limits = (here / "limits").read_text()
        return stat[0] in "tT", pending, stat[15:17], limits, os.sched_getaffinity(self.neighbour.pid)

    def names(self) -> str:
        assert self.neighbour is not None
        values = {
            "FOLDER": str(self.inner),
            "WITNESS": str(self.inner / "witness"),
            "SECRET": str(self.inner / "secret"),
            "TEMP": str(self.folder),
            "MARK": self.mark,
            "PORT": self.listeners["TCP"].getsockname()[1],
            "UDP": self.listeners["UDP"].getsockname()[1],
            "UNIX": str(self.folder / "socket"),
            "ABSTRACT": self.abstract,
            "NEIGHBOUR": self.neighbour.pid,
            "PARENT": os.getpid(),
        }
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())

    def run(self, sandbox: Sandbox, hostile: Hostile) -> tuple[Ran, list[str]]:
        """What it did, and the damage. One at a time on this machine: what a control does to all processes, a program
        beside it would seem to have done."""
        with open(__file__, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._run(sandbox, hostile)

    def _run(self, sandbox: Sandbox, hostile: Hostile) -> tuple[Ran, list[str]]:
        self._prepare()
        self.signals = 0
        before, grown, state = processes(), memory(), self._state()
        began = time.monotonic()
        ran = sandbox.run(self.names() + PRELUDE + hostile.text, tests=hostile.tests, limits=hostile.limits)
        took = time.monotonic() - began
        found = []
        if took > hostile.limits.seconds + SLACK:
            found.append(f"took {took:.1f} s")
        if memory() - grown > GROWN:
            found.append("our memory grew")
        now = self._state()
        found += ["witness changed"] if now[0] != state[0] else []
        found += [f"new file {name}" for name in now[1] - state[1]]
        for folder in ("/tmp", "/var/tmp", "/dev/shm", "/root", "/etc", str(self.folder)):
            if os.path.exists(f"{folder}/{self.mark}"):
                os.unlink(f"{folder}/{self.mark}")
                found.append(f"new file in {folder}")
        found += [f"scratch left: {name}" for name in os.listdir(self.temp) if name.startswith("opd-sandbox-")]
        for name, listener in self.listeners.items():
            with contextlib.suppress(BlockingIOError):
                (listener.recv(9) if name == "UDP" else listener.accept()[0].close())
                found.append(f"{name} was reached")
        if self.signals:
            found.append("signal to us")
        if self._neighbour() != self.before:
            found.append("neighbour harmed")
        if self.secret in ran.stdout + ran.stderr:
            found.append("secret told")
        if "witness" in ran.stdout:
            found.append("folder listed")
        for word in ("True", "hidden", "listens", "open", "maps"):
            if word in ran.stdout.replace(str(self.inner), ""):
                found.append(f"said {word}")
        # What goes on is found by its going on: in `none` it is meant to.
        left = left_behind(before, 0.2 if sandbox.confinement.kind == "none" else 5.0)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        found += ["process left"] if left else []
        if ran.passed:
            found.append("a test passed")
        return ran, found

    def _state(self) -> tuple[object, set[str]]:
        names = set(os.listdir(self.inner))
        if "witness" not in names:
            return None, names
        path = self.inner / "witness"
        facts = path.stat()
        return (
            path.read_text(),
            facts.st_mode,
            facts.st_uid,
            facts.st_nlink,
            facts.st_mtime_ns,
            os.listxattr(path),
        ), names


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
