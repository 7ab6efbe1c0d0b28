"""Starts jobs warm: a process that has imported `MODULES` forks one for each job.

Importing torch and transformers takes more CPU time than a small job does. `multiprocessing` has such a server too; it
takes longer a job (`benchmarks/job_start.py`), forks beside other threads, and leaves behind what a job started. The
modules of `opd` are those of the moment when the command started; a reproduction's own file is loaded by each job.
`python -m opd.reproductions.fork_server FD MODULE...` is that process; FD is its end of the connection.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from opd.errors import RunError
from opd.reproductions.worker import run

MODULES = ("opd.api", "opd.language.creation", "opd.provenance")
"""What the ready-made jobs import, and most others."""

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    # The allocator that pyarrow brings starts a thread when it is loaded, and then nothing may be forked.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


@contextlib.contextmanager
def fork_server(log: Path, lock: int, modules: Iterable[str]) -> Iterator[Connection]:
    """A connection that takes folders of jobs and gives `(folder, exit code)` of each job that ended.

    Jobs find `modules` imported where a fork is safe, and are fresh processes elsewhere. The server, its jobs and what
    they start are one process group, which is killed in the end; server and forks hold the file descriptor `lock` until
    they are gone. What the server itself prints goes to `log`.

    Raises:
        RunError: the server ended before that.
    """
    ours, theirs = multiprocessing.Pipe()
    with theirs, log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), *modules],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | ONE_THREAD,
            # A session of its own: Ctrl-C reaches the command alone, which then ends the whole group.
            start_new_session=True,
            pass_fds=(lock, theirs.fileno()),
        )
    try:
        with ours:
            yield ours
    except (EOFError, ConnectionError):
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it was killed"]
        problem = f"the process that starts jobs is gone: {said[-1][:300]} (see {os.path.relpath(log)})"
        raise RunError(f"{problem}; run the command again, finished jobs are kept") from None
    finally:
        # Nothing of a half-finished job is kept, so there is nothing that a milder signal would let it save.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def serve(command: Connection, modules: Iterable[str]) -> None:
    """Start a job for every folder that `command` names, until it is gone; then end them all."""
    with _ended_with_its_parent():
        multiprocessing.set_start_method("fork" if _imported_for_forks(modules) else "spawn")
    running: dict[str, multiprocessing.Process] = {}
    while True:
        # A job's sentinel stays silent while a process that it forked lives, hence the limit.
        wait([command, *(process.sentinel for process in running.values())], 0.5)
        try:
            while command.poll():
                folder = command.recv()
                running[folder] = multiprocessing.Process(target=run, args=(Path(folder), os.getpid()))
                running[folder].start()
            for folder in [folder for folder, process in running.items() if process.exitcode is not None]:
                command.send((folder, running.pop(folder).exitcode))
        except (EOFError, ConnectionError):
            _end_group()


def _imported_for_forks(modules: Iterable[str]) -> bool:
    """Import `modules`; False where a fork of that is not safe, so that each job imports them itself.

    Another thread's locks would stay locked for ever in a fork, threads of native libraries included, and neither CUDA
    nor the libraries of macOS, which does not list threads here, work in one.
    """
    threads = Path("/proc/self/task")
    if not threads.is_dir():
        return False
    for module in modules:
        importlib.import_module(module)
    _warm_up()
    torch = sys.modules.get("torch")
    return len(os.listdir(threads)) == 1 and not (torch and torch.cuda.is_initialized())


def _warm_up() -> None:
    """Do what each job would do once again: in a small one transformers' table of the names of weights is a quarter of
    the CPU time, and collections of garbage that go through all that was imported are another."""
    if "transformers" in sys.modules:
        with contextlib.suppress(ImportError):
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping

            get_checkpoint_conversion_mapping("llama")
    gc.collect()
    # The collector leaves it alone from here on, and so forks share its memory too.
    gc.freeze()


@contextlib.contextmanager
def _ended_with_its_parent() -> Iterator[None]:
    """Not by a thread that watches, since a process that forks must have but one."""
    parent = os.getppid()

    def look(number: int, frame: Any) -> None:
        if os.getppid() != parent:
            _end_group()

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _end_group() -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2:])
