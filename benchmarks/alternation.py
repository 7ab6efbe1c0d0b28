"""Contestants in processes of their own, taking turns step by step.

A busy machine then slows all of them alike, none sees another's patches or allocator, and while one computes the others
sleep. Peak memory is measured in further processes, whose allocator gives large buffers back at once, so that a peak
counts what is alive. A GPU is nobody else's and holds one large pair of models: there a contestant runs alone, and the
device counts its memory itself.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import statistics
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.isolated import M_MMAP_THRESHOLD, _allocator, _status
from benchmarks.loss_operator import describe_machine, versions
from benchmarks.opening import open_session
from benchmarks.session import Job

MEMORY_STEPS = 2
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "100000", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """One contestant's process; of one thread, it stays on one core (`core` counts from the last that is allowed)."""

    def __init__(self, job: Job, memory: bool = False, core: int = 0):
        self.job = job
        # Read by the libraries when they are first imported, which is in the new process.
        os.environ.update(QUIET, OMP_NUM_THREADS=str(job.threads), MKL_NUM_THREADS=str(job.threads))
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job, memory, core), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *command: Any) -> Any:
        """Send a command and wait for its answer; the first answer of all, to `ask()`, says that models are loaded."""
        if command:
            self.send(*command)
        return self.receive()

    def send(self, *command: Any) -> None:
        self.connection.send(command)

    def receive(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            answer = "the process ended without an answer; out of memory?"
        if isinstance(answer, str):
            raise RuntimeError(f"{self.job.contestant} at {self.job.size.name}: {answer}")
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()


def _work(connection: Connection, job: Job, memory: bool, core: int) -> None:
    try:
        _run(connection, job, memory, core)
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        connection.send(traceback.format_exc())


def _run(connection: Connection, job: Job, memory: bool, core: int) -> None:
    sys.stdout = sys.stderr
    silence()
    torch.set_num_threads(job.threads)
    if job.threads == 1 and not memory and job.device == "cpu":
        cores = sorted(os.sched_getaffinity(0), reverse=True)
        os.sched_setaffinity(0, {cores[core % len(cores)]})
    if memory:
        _allocator("mallopt", M_MMAP_THRESHOLD, 2**18)
    session = open_session(job)
    gc.collect()
    if memory:
        _read_weights()
    connection.send({"loaded_bytes": _bytes(job.device, "VmRSS")})
    command, *arguments = connection.recv()
    while command == "score":
        completions = arguments[0] if arguments else session.examples()
        session.phases.restart()
        score = session.score(completions)
        connection.send({**asdict(score), "seconds": session.phases.take(), "completions": completions})
        command, *arguments = connection.recv()

    def after_step() -> bool:
        figures = {**session.phases.take(), "tokens": session.sampled, "peak_bytes": _bytes(job.device, "VmHWM")}
        connection.send(figures)
        connection.recv()
        session.sampled = 0
        session.phases.restart()
        return True

    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # scoring takes all completions at once
    session.train(after_step)


def _read_weights() -> None:
    """Weights are mapped from their files and resident only once they were read."""
    for module in [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]:
        for weight in module.parameters(recurse=False):
            weight.detach().sum()


def _bytes(device: str, field: str) -> int:
    """Of the process: what is alive (`VmRSS`) or was at most (`VmHWM`), on the device that computes."""
    if device == "cuda":
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    return _status(field)


def silence() -> None:
    """Keep the libraries' notices out of the output."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("trl").setLevel(logging.ERROR)


def compete(jobs: Sequence[Job], repeats: int, progress: Any = None) -> dict[str, dict[str, Any]]:
    """Score equal completions, then step in turns: `repeats` timed steps after one that warms up.

    Returns, by contestant: `score`, `steps` (figures of each), and the medians that `summary` makes of them.
    """
    if len(jobs) > 1 and jobs[0].device == "cuda":
        return {name: of for job in jobs for name, of in compete([job], repeats, progress).items()}
    workers = {job.contestant: Worker(job) for job in jobs}
    try:
        found: dict[str, dict[str, Any]] = {}
        for name, worker in workers.items():
            found[name] = {**worker.ask(), "load_average": os.getloadavg(), "steps": []}
        completions = None
        for name, worker in workers.items():
            answer = worker.ask("score", *([completions] if completions else []))
            completions = answer.pop("completions")
            found[name]["score"] = answer
        for repeat in range(repeats + 1):
            for name, worker in workers.items():
                if progress:
                    progress(f"{name}, step {repeat} of {repeats}")
                step = worker.ask("step")
                if repeat:  # the first one warms up
                    found[name]["steps"].append(step)
    finally:
        for worker in workers.values():
            worker.close()
    return {name: {**figures, **summary(figures["steps"])} for name, figures in found.items()}


def peak_memory(job: Job) -> dict[str, int]:
    """Bytes resident after loading, and at most during `MEMORY_STEPS` steps, the largest of which had `tokens`."""
    worker = Worker(job, memory=True)
    try:
        loaded = worker.ask()["loaded_bytes"]
        steps = [worker.ask("step") for _ in range(MEMORY_STEPS)]
    finally:
        worker.close()
    return {"loaded_bytes": loaded, "peak_bytes": steps[-1]["peak_bytes"], "tokens": max(s["tokens"] for s in steps)}


def summary(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over steps: seconds in all and by phase on both clocks, and tokens per second."""
    if not steps:
        return {}
    text: dict[str, Any] = {}
    for clock in ("cpu", "wall"):
        phases = sorted({phase for step in steps for phase in step[clock]})
        totals = [sum(step[clock].values()) for step in steps]
        text |= {
            f"{clock}_seconds": statistics.median(totals),
            f"{clock}_range": [min(totals), max(totals)],
            f"{clock}_by_phase": {p: statistics.median(s[clock].get(p, 0.0) for s in steps) for p in phases},
            f"tokens_per_{clock}_second": statistics.median(
                s["tokens"] / s[clock]["rollout"] for s in steps if s[clock].get("rollout")
            ),
        }
    # Steps are of different content, the same for all contestants: per token they compare across steps.
    text["cpu_per_token"] = statistics.median(sum(s["cpu"].values()) / s["tokens"] for s in steps)
    return text


def versions_and_machine(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {"versions": versions(), "machine": describe_machine(device)}


def write(path: Path, report: dict[str, Any]) -> None:
    """A long run that is cut short keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
