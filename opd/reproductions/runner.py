"""Runs the jobs of a graph that are not finished yet, each in a process of its own with one thread."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from opd.errors import RunError
from opd.reproductions.definition import Figures
from opd.reproductions.fork_server import MODULES, fork_server
from opd.reproductions.jobs import Job, source_of

Records = dict[str, dict[str, Any]]
"""What job.json holds, by key."""

Check = Callable[[Job, Figures], str | None]
"""Looks at a finished job; a text means that nothing more may start, and says why."""


@dataclass
class Outcome:
    """What did not go as hoped.

    Attributes:
        failed: name of each failed job and one line that says why. What depends on one does not run.
        closed: why a gate closed, if one did.
    """

    failed: dict[str, str] = field(default_factory=dict)
    closed: str | None = None


def run_jobs(
    jobs: Sequence[Job],
    cache: Path,
    reproductions: Path,
    workers: int,
    console: Console,
    check: Check = lambda job, figures: None,
    first: Sequence[Job] = (),
    imports: Sequence[str] = (),
) -> Outcome:
    """Run what is missing of `jobs` (inputs first, keys unique), at most `workers` at a time.

    A job starts when its inputs are finished; a job that is not among the stages `first` or their inputs also waits
    for those. Processes find the modules `imports` imported. Ended from outside, it ends its workers; finished jobs
    stay, and unfinished folders do not count.

    Raises:
        RunError: another process runs jobs in this cache, or the process that starts them is killed.
    """
    early = {job.key for stage in first for job in stage.with_inputs()}
    waits_for = {
        job.key: {other.key for other in job.inputs.values()} | (set() if job.key in early else early) for job in jobs
    }
    outcome, lost = Outcome(), set[str]()
    done: Records = {}
    running: dict[str, Worker] = {}

    def take_in(job: Job) -> bool:
        record = job.record(cache)
        if record is not None:
            done[job.key] = record
            outcome.closed = outcome.closed or check(job, record["figures"])
        return record is not None

    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_locked(cache))
        stack.enter_context(_terminated_as_exit())
        show = stack.enter_context(_progress(console, len(jobs)))
        waiting = [job for job in jobs if not take_in(job)]
        for line in changed_since(jobs, done):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        show(done, [], waiting, workers)
        if not waiting:
            return outcome
        # A reproduction of none but its own functions may need nothing of the kind; six seconds are spared then.
        modules = (*MODULES, *imports) if any(job.function.startswith("opd.") for job in jobs) else tuple(imports)
        server = stack.enter_context(fork_server(cache / "output.txt", lock, modules))
        while True:
            for job in list(waiting):
                if outcome.closed:
                    waiting.clear()
                elif waits_for[job.key] & lost:
                    waiting.remove(job)
                    lost.add(job.key)
                elif waits_for[job.key] <= done.keys() and len(running) < workers:
                    waiting.remove(job)
                    worker = Worker(job, cache, reproductions)
                    running[str(worker.folder)] = worker
                    server.send(str(worker.folder))
            show(done, running.values(), waiting, workers)
            if not running:
                return outcome
            if server.poll(0.1):
                folder, code = server.recv()
                worker = running.pop(folder)
                if take_in(worker.job):
                    console.print(f"{worker.job.name}: {worker.seconds():.0f} s", highlight=False, markup=False)
                else:
                    lost.add(worker.job.key)
                    outcome.failed[worker.job.name] = worker.why_failed(code)
                    console.print(f"{worker.job.name} failed: {worker.why_failed(code)}", highlight=False, markup=False)


def changed_since(jobs: Sequence[Job], done: Records) -> list[str]:
    """One line for each file whose finished jobs ran when it was another: they are found again by what they are, which
    the text of a function is no part of."""
    stale: dict[str, list[str]] = {}
    for job in jobs:
        then = done.get(job.key, {}).get("source")
        if then is not None and then != source_of(job.function):
            stale.setdefault(job.function.partition(":")[0], []).append(job.name)
    return [
        f"{module} has changed since {len(names)} finished jobs ran ({names[0]} is the first): their results are kept. "
        "Where the change matters to a stage, raise its version"
        for module, names in stale.items()
    ]


class Worker:
    """A job in a process of its own, and its folder, emptied and with what the process needs to know."""

    def __init__(self, job: Job, cache: Path, reproductions: Path):
        self.job, self.folder = job, (cache / job.key).resolve()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        task = {
            "name": job.name,
            "function": job.function,
            "version": job.version,
            "params": job.params,
            "inputs": {name: other.key for name, other in job.inputs.items()},
            "reproductions": str(reproductions.resolve()),
        }
        (self.folder / "task.json").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
        self.started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def why_failed(self, code: int) -> str:
        """One line: what it said last, or what killed it, and where the rest is."""
        output = self.folder / "output.txt"
        text = output.read_text(encoding="utf-8", errors="replace").strip() if output.exists() else ""
        last = text.splitlines()[-1] if text else f"exit code {code}"
        if code < 0:
            last = f"killed by {signal.Signals(-code).name}"
        return f"{last[:300]} (see {os.path.relpath(output)})"


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[int]:
    cache.mkdir(parents=True, exist_ok=True)
    file: IO[str]
    with (cache / "lock").open("w") as file:
        for attempt in range(4):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 3:
                    raise RunError(f"another process runs jobs in {cache}; wait for it or end it") from None
                # Workers of a command that was killed notice within half a second.
                time.sleep(0.5)
        yield file.fileno()


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C does, so that the workers are ended."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[..., None]]:
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[left]}  {task.fields[now]}"), console=console) as bar:
        task = bar.add_task("jobs", total=total, left="", now="")

        def show(done: Records, running: Iterable[Worker], waiting: Sequence[Job], workers: int) -> None:
            left = seconds_left(done.values(), running, waiting, workers)
            now = ", ".join(worker.job.name for worker in running)
            bar.update(task, completed=len(done), now=now, left="" if left is None else f"about {_clock(left)} left")

        yield show


def seconds_left(
    done: Iterable[dict[str, Any]], running: Iterable[Worker], waiting: Sequence[Job], workers: int
) -> float | None:
    """Estimate by the mean of finished jobs of the same function, or of all; None before the first."""
    times: dict[str, list[float]] = {}
    for record in done:
        times.setdefault(record["function"], []).append(record["seconds"])
    if not times:
        return None
    means = {function: sum(taken) / len(taken) for function, taken in times.items()}
    typical = sum(means.values()) / len(means)
    ahead = sum(means.get(job.function, typical) for job in waiting)
    ahead += sum(max(means.get(w.job.function, typical) - w.seconds(), 0.0) for w in running)
    return ahead / workers


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
