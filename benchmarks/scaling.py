"""What `opd` costs per token as things grow, and two processes: `python -m benchmarks.scaling --json PATH`.

Three curves on small models with random weights: completion length (the same for all rows, and the sampled tokens of a
step nearly so), completions of one prompt, vocabulary; each with the peak memory of a fresh process. Then two processes
of one thread each share a step's prompts over gloo: their gradient on given completions against one process's, and
sampled tokens a second of wall clock.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.alternation import Worker, compete, peak_memory, summary, versions_and_machine, write
from benchmarks.contestants import OPD, Job
from benchmarks.head_to_head import last_line, progress
from benchmarks.sizes import Shape, Size, materialise

LENGTHS = (64, 256, 1024, 4096)
GROUPS = (1, 4, 16)
VOCABULARIES = (1024, 8192, 32768, 131072)
BASE = Size("scaling", 4096, Shape(128, 4, 4), Shape(256, 6, 4), batch=16, shortest=8, longest=256)
TOKENS = 4096
"""About so many sampled tokens in a step of the curve over lengths."""
SPEED_GOAL, GRADIENT_GOAL = 1.7, 1e-5


def points(quick: bool) -> dict[str, list[tuple[int, Size]]]:
    """The sizes of each curve."""
    lengths, groups, vocabularies = (axis[:2] if quick else axis for axis in (LENGTHS, GROUPS, VOCABULARIES))
    base = replace(BASE, batch=4, longest=32) if quick else BASE
    tokens = 256 if quick else TOKENS
    return {
        "completion length": [(n, replace(base, batch=max(1, tokens // n), shortest=n, longest=n)) for n in lengths],
        "completions of a prompt": [
            (g, replace(base, batch=16 // g, group=g, prompt=(256, 256), longest=64)) for g in groups
        ],
        "vocabulary": [(v, replace(base, vocabulary=v)) for v in vocabularies],
    }


def curve(along: str, sizes: Sequence[tuple[int, Size]], repeats: int) -> list[dict[str, Any]]:
    """Cost per sampled token and peak memory of each size."""
    found = []
    for value, size in sizes:
        progress(f"{along} {value}")
        materialise(size)
        job = Job(OPD, size)
        of = compete([job], repeats)[OPD]
        tokens = sum(step["tokens"] for step in of["steps"]) / len(of["steps"])
        by_phase = {phase: s / tokens for phase, s in of["cpu_by_phase"].items()}
        memory = peak_memory(job)
        kept = {"along": along, "value": value, "size": asdict(size), "tokens": tokens}
        found.append({**kept, "cpu_per_token": of["cpu_per_token"], "cpu_per_token_by_phase": by_phase, **memory})
    return found


def two_processes(size: Size, repeats: int) -> dict[str, Any]:
    """One process against two that share the same step: gradient, throughput."""
    materialise(size)
    alone = _together(size, 1, repeats)
    both = _together(size, 2, repeats)
    # Every process has the whole gradient; the loss is a sum over their parts.
    loss = sum(rank["score"]["loss"] for rank in both)
    # Every process counts the tokens of all; a step has taken as long as its slowest process.
    speeds = [
        sum(step["tokens"] for step in ranks[0]["steps"])
        / sum(max(sum(rank["steps"][i]["wall"].values()) for rank in ranks) for i in range(repeats))
        for ranks in (alone, both)
    ]
    one, shared = (ranks[0]["score"] for ranks in (alone, both))
    apart = max(abs(shared[key] - one[key]) for key in ("gradient_norm", "gradient_component"))
    return {
        "size": asdict(size),
        "tokens_per_second": speeds,
        "speed_up": speeds[1] / speeds[0],
        "loss_error": abs(loss / one["loss"] - 1),
        "gradient_error": apart / one["gradient_norm"],
    }


def _together(size: Size, processes: int, repeats: int) -> list[dict[str, Any]]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    workers = []
    try:
        for rank in range(processes):
            if processes > 1:
                own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
                os.environ.update({key: str(value) for key, value in own.items()})
            workers.append(Worker(Job(OPD, size), core=rank))
        found: list[dict[str, Any]] = [{**worker.ask(), "steps": []} for worker in workers]
        for worker in workers:
            worker.send("score")
        for worker, of in zip(workers, found, strict=True):
            of["score"] = worker.receive()
            of["score"].pop("completions")
        for repeat in range(repeats + 1):
            for worker in workers:
                worker.send("step")
            steps = [worker.receive() for worker in workers]
            if repeat:
                for of, step in zip(found, steps, strict=True):
                    of["steps"].append(step)
    finally:
        for key in (*shared, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(key, None)
        for worker in workers:
            worker.close()
    return [{**of, **summary(of["steps"])} for of in found]


def judge(processes: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Goals of the two processes."""
    speed = None if processes is None else processes["speed_up"]
    error = None if processes is None else max(processes["gradient_error"], processes["loss_error"])
    return [
        {
            "goal": f"throughput of two processes / one >= {SPEED_GOAL:g}",
            "figure": speed,
            "met": None if speed is None else speed >= SPEED_GOAL,
        },
        {
            "goal": f"loss and gradient of two processes equal to {GRADIENT_GOAL:g}",
            "figure": error,
            "met": None if error is None else error <= GRADIENT_GOAL,
        },
    ]


def show(report: dict[str, Any]) -> None:
    """The curves as one table."""
    phases = ("rollout", "teacher", "student", "loss", "backward", "optimizer", "rest")
    table = Table(title="CPU microseconds a sampled token, one thread")
    for column in ("along", "", "all", *phases, "peak MB"):
        table.add_column(column, justify="right")
    for point in report["points"]:
        shown = [f"{1e6 * point['cpu_per_token_by_phase'].get(phase, 0):.0f}" for phase in phases]
        memory = f"{point['peak_bytes'] / 1e6:.0f}"
        table.add_row(point["along"], str(point["value"]), f"{1e6 * point['cpu_per_token']:.0f}", *shown, memory)
    Console(width=max(130, Console().width)).print(table)


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short points a curve, one repeat")
    parser.add_argument("--repeats", type=int, help="timed steps of each point; default 3, or 1 with --quick")
    parser.add_argument("--no-processes", action="store_true", help="leave out the two processes")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    repeats = options.repeats or (1 if options.quick else 3)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]]),
        **versions_and_machine(),
        "repeats": repeats,
        "points": [],
        "processes": None,
    }
    for along, sizes in points(options.quick).items():
        report["points"] += curve(along, sizes, repeats)
        write(options.json, report)
    if not options.no_processes:
        progress("two processes")
        report["processes"] = two_processes(replace(BASE, batch=4, longest=32) if options.quick else BASE, repeats)
    report["goals"] = judge(report["processes"])
    write(options.json, report)
    show(report)
    sys.stdout.flush()
    print(last_line("scaling", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
