"""Running one program: its process, its limits as far as we keep them, and what it left."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import secrets
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.errors import RunError
from opd.sandbox.base import Confinement, Ended, Limits, Ran, interpreter

START = 60.0
"""Seconds that a process may take to be ready on a busy machine; they are not the program's."""
GONE = 10.0
"""Seconds in which the kernel ends a process that was killed."""
TICK = 0.02
"""Seconds between two looks at the clock, the files and the threads of a program."""
CHANNEL = 1 << 20
"""Most bytes that the harness's own channel takes."""
SHOWN = 300
"""Characters of a message that an error repeats."""


class NotReadyError(Exception):
    """A process ended, or took too long, before it was confined."""


class Sandbox:
    """Programs under one confinement, each in a process and a folder of its own; threads may share it."""

    def __init__(self, confinement: Confinement):
        self.confinement = confinement

    def run(
        self,
        program: str,
        *,
        stdin: str = "",
        tests: Sequence[str] = (),
        every_test: bool = False,
        limits: Limits | None = None,
    ) -> Ran:
        """Run Python text, as a script or with tests of it.

        Args:
            program: with `tests` a module of the name `program`, else the main module.
            stdin: what it can read.
            tests: Python texts that run after it in its names, one after another; one passes when it raises nothing.
            every_test: go on behind a test that failed.
            limits: default `Limits()`.

        Raises:
            RunError: the process could not be started or confined, twice. A program cannot cause that.
        """
        for last in (False, True):
            try:
                return self._run_once(program, stdin, tests, every_test, limits or Limits())
            except (NotReadyError, OSError) as error:
                if last:
                    raise RunError(
                        f"sandbox {self.confinement.kind!r}: a program could not be started ({str(error)[:SHOWN]}); "
                        "no verdict is given"
                    ) from error
        raise AssertionError

    def _run_once(self, program: str, stdin: str, tests: Sequence[str], every_test: bool, limits: Limits) -> Ran:
        confinement, secret = self.confinement, secrets.token_hex(16)
        scratch = Path(tempfile.mkdtemp(prefix="opd-sandbox-"))
        try:
            settings = {
                "program": program,
                "testing": bool(tests),
                "confined": confinement.confines,
                "modules": list(confinement.modules),
                "limits": limits.of_system,
                "parent": 0 if confinement.wraps else os.getpid(),
                "landlock": confinement.landlock(scratch),
                "filter": confinement.filter.hex(),
            }
            after = {"tests": list(tests), "all": every_test, "secret": secret}
            messages = _framed(settings) + (_framed(after) if tests else b"")
            with Running(confinement, scratch, messages, stdin.encode(), limits) as running:
                ended, exit, cpu = running.wait()
            return _told(running, ended, exit, cpu, limits, secret, confinement.wraps)
        finally:
            remove(scratch)


def _framed(message: Mapping[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return len(data).to_bytes(8, "little") + data


class Running:
    """A process while it runs, with its pipes."""

    def __init__(self, confinement: Confinement, scratch: Path, messages: bytes, stdin: bytes, limits: Limits):
        self.limits, self.scratch = limits, scratch
        home = confinement.home(scratch)
        requests, sent = os.pipe()
        try:
            read, replies = os.pipe()
        except OSError:
            os.close(requests)
            os.close(sent)
            raise
        try:
            self.process = subprocess.Popen(
                [
                    *confinement.command(scratch),
                    *(interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", _inside(), str(requests), str(replies)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(requests, replies),
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home, "MALLOC_ARENA_MAX": "1"},
                cwd=scratch,
                start_new_session=True,
            )
        except OSError:
            for pipe in (sent, read):
                os.close(pipe)
            raise
        finally:
            os.close(requests)
            os.close(replies)
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.pipes = {"sent": sent, "replies": read}
        # It takes no descriptor of its own.
        self.selector = selectors.PollSelector()
        try:
            for name, file in (("stdin", process.stdin), ("stdout", process.stdout), ("stderr", process.stderr)):
                self.pipes[name] = os.dup(file.fileno())
                file.close()
            self.left = {"sent": memoryview(messages), "stdin": memoryview(stdin)}
            self.got = {"replies": bytearray(), "stdout": bytearray(), "stderr": bytearray()}
            for name, pipe in self.pipes.items():
                os.set_blocking(pipe, False)
                self.selector.register(pipe, selectors.EVENT_WRITE if name in self.left else selectors.EVENT_READ, name)
        except OSError:
            # No descriptors are left: the process waits for a message that nobody sends.
            self.__exit__()
            raise
        self.began: float | None = None
        self.seconds = 0.0

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        if self.process.returncode is None:
            self._reap(GONE)
        self.selector.close()
        for name in list(self.pipes):
            os.close(self.pipes.pop(name))

    def wait(self) -> tuple[Ended | None, int, float]:
        """Until it has ended or is ended here: the limit that it met here, its exit status, and its CPU seconds.

        Raises:
            NotReadyError: it was not confined yet.
        """
        started = now = time.monotonic()
        looked, reason = 0.0, None
        status = cpu = None
        while status is None and reason is None:
            self._exchange(TICK)
            now = time.monotonic()
            if self.began is None and self.got["replies"].startswith(b"ready\n"):
                self.began = now
            status, cpu = self._ended()
            reason = self._flooded()
            if self.began is None:
                if now - started > START:
                    raise NotReadyError(f"not ready within {START:g} s{self._message()}")
            elif now - self.began > self.limits.seconds:
                reason = reason or "time"
            elif now - looked >= TICK:
                looked, reason = now, reason or self._grown()
        self.seconds = now - (self.began or now)
        if status is None:
            self._kill()
            status, cpu = self._reap(GONE)
        # What it wrote last; a process that the kernel has ended holds no pipe any more.
        while self._exchange(0) and self._flooded() is None:
            pass
        if not self.got["replies"].startswith(b"ready\n"):
            raise NotReadyError(f"exit status {status}{self._message()}")
        assert cpu is not None
        return reason or self._flooded() or self._grown(ended=True), status, cpu

    def _exchange(self, seconds: float) -> bool:
        """Write and read what can be without waiting longer than that; whether anything was read."""
        read = False
        for key, _ in self.selector.select(seconds):
            name, pipe = key.data, key.fd
            try:
                if name in self.left:
                    self.left[name] = self.left[name][os.write(pipe, self.left[name][: 1 << 16]) :]
                    done = not self.left[name]
                else:
                    data = os.read(pipe, 1 << 16)
                    self.got[name] += data
                    done, read = not data, read or bool(data)
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                done = True
            if done:
                self.selector.unregister(pipe)
                os.close(self.pipes.pop(name))
        if not self.selector.get_map():
            time.sleep(min(seconds, TICK / 4))
        return read

    def _ended(self) -> tuple[int | None, float | None]:
        """Exit status and CPU seconds of the process with those that it waited for, once it has ended."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None, None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, usage.ru_utime + usage.ru_stime

    def _reap(self, seconds: float) -> tuple[int, float]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            status, cpu = self._ended()
            if status is not None and cpu is not None:
                return status, cpu
            time.sleep(TICK / 4)
        raise RunError(f"sandbox: process {self.process.pid} was killed and does not end; see what holds it with ps")

    def _kill(self) -> None:
        """All of its session: the starter, too, where another program confines it."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _flooded(self) -> Ended | None:
        written = len(self.got["stdout"]) + len(self.got["stderr"])
        return "output" if written > self.limits.output or len(self.got["replies"]) > CHANNEL else None

    def _grown(self, ended: bool = False) -> Ended | None:
        """Whether its files or its threads are more than they may be."""
        size = _size(self.scratch, self.limits.entries)
        if size is None or size > self.limits.files << 20:
            return "files"
        return None if ended or _threads(self.process.pid) <= self.limits.threads else "threads"

    def _message(self) -> str:
        text = self.got["stderr"].decode(errors="replace").strip()
        return f": {text.splitlines()[-1]}" if text else ""


def _told(running: Running, met: Ended | None, exit: int, cpu: float, limits: Limits, secret: str, wraps: bool) -> Ran:
    if exit > 128 and wraps:
        exit = 128 - exit
    replies = bytes(running.got["replies"]).decode(errors="replace").splitlines()
    passed = {line.removeprefix(f"{secret} ") for line in replies if line.startswith(f"{secret} ")}
    ended: Ended
    if met is not None:
        ended = met
    elif "memory" in replies and exit:
        ended = "memory"
    elif exit == -signal.SIGKILL and max(cpu, running.seconds) >= limits.cpu_seconds:
        # A starter may end without having counted what it started.
        ended = "cpu"
    elif exit < 0:
        ended = "killed"
    else:
        ended = "error" if exit else "finished"
    stdout, stderr = (
        bytes(running.got[name][: limits.output]).decode(errors="replace") for name in ("stdout", "stderr")
    )
    return Ran(
        ended, exit, stdout, stderr, frozenset(int(n) for n in passed if n.isdecimal() and len(n) < 9), running.seconds
    )


@functools.cache
def _inside() -> str:
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8")


def _size(folder: Path, entries: int) -> int | None:
    """Bytes on the disk of all files beneath; None for more entries than that, or for a folder that hides some."""
    size, count, todo = 0, 0, [str(folder)]
    while todo:
        try:
            with os.scandir(todo.pop()) as found:
                for entry in found:
                    count += 1
                    if count > entries:
                        return None
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue
        except OSError:
            # No right to list it, or a path longer than the system takes.
            return None
    return size


def _threads(pid: int) -> int:
    """Of a process and of those that it started; 0 where the system does not say."""
    count, todo = 0, [pid]
    while todo:
        one = todo.pop()
        try:
            tasks = os.listdir(f"/proc/{one}/task")
            children = Path(f"/proc/{one}/task/{one}/children").read_text()
        except OSError:
            continue
        count += len(tasks)
        todo += [int(child) for child in children.split()]
    return count


def remove(folder: Path) -> None:
    """Delete a folder whatever lies in it, without following a link.

    What was killed may make one thing more: then it is emptied again.

    Raises:
        RunError: it could not be.
    """
    until = time.monotonic() + GONE
    while True:
        try:
            return _remove(folder)
        except OSError as error:
            passing = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
            if not passing or time.monotonic() > until:
                raise RunError(f"sandbox: cannot delete {folder} ({error.strerror}); delete it by hand") from None
        time.sleep(TICK)


def _remove(folder: Path) -> None:
    """Folders within folders are moved up before they are emptied, so that no depth is too deep; to names that no
    program could have guessed."""
    up, number = f".up-{secrets.token_hex(16)}", 0
    while folder.exists():
        os.chmod(folder, 0o700)
        entries = list(os.scandir(folder))
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)
                    number += 1
                    os.rename(inner.path, folder / f"{up}-{number}")
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)
        if not entries:
            os.rmdir(folder)
