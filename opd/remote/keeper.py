"""Keeps one command: runs it in a process group of its own, and ends the whole group when whoever asked for it is gone.

It is run as a file, not as a part of the library, so that it starts at once and holds no memory: `keeper.py PARENT
COMMAND...` with a pipe as its input that PARENT never writes to. The kernel closes the pipe however PARENT ends, by
SIGKILL too. The command's exit code becomes its own, 128 + N after signal N.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

GRACE = 10.0
"""Seconds that a group has between SIGTERM and SIGKILL."""

LOOK = 0.2
"""Seconds between two looks at the parent."""


def main(parent: int, command: list[str]) -> int:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    # A byte arrives with every signal, so that the end of the command is noticed at once.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        print(f"{command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
    # A process that the parent forked may hold the pipe open after the parent's end, so its id is looked at too.
    while process.poll() is None and not asked and os.getppid() == parent:
        ready, _, _ = select.select([0, woken], [], [], LOOK)
        if 0 in ready and not os.read(0, 4096):
            break
        if woken in ready:
            os.read(woken, 4096)
    end(process)
    code = process.returncode
    return 1 if code is None else code if code >= 0 else 128 - code


def end(process: subprocess.Popen[bytes]) -> None:
    """End all that is left of the command's group, by force after `GRACE` seconds."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 2.0)):
        if not alive(process):
            return
        try:
            os.killpg(process.pid, number)
        except OSError:
            return
        until = time.monotonic() + seconds
        while alive(process) and time.monotonic() < until:
            time.sleep(0.02)


def alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether the group has a member; the command itself is taken leave of when it has ended."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return process.returncode is None
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
