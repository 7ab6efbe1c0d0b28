"""A step with pictures of `opd`, a bare loop and TRL: `python -m benchmarks.vision_step [--quick] --json PATH`.

The student writes under a picture, the teacher scores under a picture of its own, and the student descends reverse KL
over the vocabulary at every token. The bare loop (`benchmarks/vision_contestants.py`) does that in plain torch over the
same transformers models: it passes each prompt once for all completions that share it, keeps a cache, and does nothing
else. TRL's `DistillationTrainer` shows its teacher the student's picture, as large as the other. Each side is a process
of its own with one thread, and they take turns step by step.

In TRL's loss stand all ids, with opd and in the bare loop those that stand for pictures are left out on both sides; so
its loss is held to a wider margin.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.alternation import Worker, compete, versions_and_machine, write
from benchmarks.contestants import FLOOR, OPD, TRL
from benchmarks.head_to_head import last_line, progress
from benchmarks.pictured import TEXT, Pictured, materialise
from benchmarks.session import STEPS, Job

GOAL, PEER_GOAL = 1.15, 2.0
"""CPU of opd's step over the bare loop's, at most; TRL's over opd's, at least."""
TOLERANCE, PEER_TOLERANCE = 1e-5, 1e-2
SIZES = tuple(
    Pictured(f"{family}, {batch} x {group}", 10000, TEXT, TEXT, batch, group, 32, 32, (12, 12), family=family)
    for family in ("qwen2_5_vl", "idefics3")
    for batch, group in ((8, 1), (4, 4))
)
QUICK = {"vocabulary": 500, "batch": 2, "shortest": 6, "longest": 6}


def measure(size: Pictured, repeats: int, peer: bool) -> dict[str, Any]:
    """One cell: every side's steps, ratios, and how far losses are apart."""
    materialise(size, STEPS)
    names = (OPD, FLOOR, *((TRL,) if peer else ()))
    found = compete([Job(name, size) for name in names], repeats, lambda text: progress(f"{size.name}: {text}"))
    scores = {name: of["score"] for name, of in found.items()}
    cell = {
        "size": asdict(size),
        "contestants": found,
        "over_floor": {clock: found[OPD][f"{clock}_seconds"] / found[FLOOR][f"{clock}_seconds"] for clock in CLOCKS},
        "loss_error": abs(scores[OPD]["loss"] / scores[FLOOR]["loss"] - 1),
        "gradient_error": abs(scores[OPD]["gradient_component"] - scores[FLOOR]["gradient_component"])
        / scores[FLOOR]["gradient_norm"],
    }
    if peer:
        same = _score(Job(FLOOR, replace(size, sees="image")))
        cell["peer_over_opd"] = {c: found[TRL][f"{c}_seconds"] / found[OPD][f"{c}_seconds"] for c in CLOCKS}
        cell["peer_loss_error"] = abs(scores[TRL]["loss"] / same["loss"] - 1)
    return cell


CLOCKS = ("cpu", "wall")


def _score(job: Job) -> dict[str, Any]:
    """A contestant's loss on the completions that all score."""
    worker = Worker(job)
    try:
        worker.ask()
        answer: dict[str, Any] = worker.ask("score")
        return answer
    finally:
        worker.close()


def judge(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals, of the worst cell; `met` is None where none was measured."""
    ratio = max((c["over_floor"]["cpu"] for c in cells), default=None)
    goals = [_goal(f"pictures: CPU of opd / bare loop <= {GOAL:g}", ratio, ratio is not None and ratio <= GOAL)]
    for group in sorted({size.group for size in SIZES}, reverse=True):
        peers_of = [c["peer_over_opd"]["cpu"] for c in cells if "peer_over_opd" in c and c["size"]["group"] == group]
        least = min(peers_of, default=None)
        text = f"pictures, completions of a prompt: {group}: CPU of TRL / opd >= {PEER_GOAL:g}"
        goals.append(_goal(text, least, least is not None and least >= PEER_GOAL))
    apart = {
        f"loss and gradient on equal completions equal to {TOLERANCE:g}": ("loss_error", "gradient_error", TOLERANCE),
        f"TRL's loss, of all ids, equal to {PEER_TOLERANCE:g}": ("peer_loss_error", "peer_loss_error", PEER_TOLERANCE),
    }
    for text, (first, second, most) in apart.items():
        error = max((c[key] for c in cells for key in (first, second) if key in c), default=None)
        goals.append(_goal(f"pictures: {text}", error, error is not None and error <= most))
    return goals


def _goal(text: str, figure: float | None, met: bool) -> dict[str, Any]:
    return {"goal": text, "figure": figure, "met": None if figure is None else met}


def show(cells: list[dict[str, Any]]) -> None:
    """CPU seconds of each phase."""
    phases = ("rollout", "teacher", "student", "loss", "backward", "optimizer", "rest")
    table = Table(title="CPU seconds a step, medians; one thread")
    for column in ("prompts x completions", "", "step (range)", "wall", *phases, "over the bare loop"):
        table.add_column(column, justify="right")
    for cell in cells:
        floor = cell["contestants"][FLOOR]["cpu_seconds"]
        for name, of in cell["contestants"].items():
            low, high = of["cpu_range"]
            by_phase = [f"{of['cpu_by_phase'].get(phase, 0):.3g}" for phase in phases]
            steps = f"{of['cpu_seconds']:.3g} ({low:.3g}-{high:.3g})"
            ratio = f"{of['cpu_seconds'] / floor:.2f}"
            table.add_row(cell["size"]["name"], name, steps, f"{of['wall_seconds']:.3g}", *by_phase, ratio)
    Console(width=max(170, Console().width)).print(table)


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision_step", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two steps of two prompts and a few tokens")
    parser.add_argument("--repeats", type=int, help="timed steps of each side; default 5, or 2 with --quick")
    parser.add_argument("--no-peers", action="store_true", help="without TRL")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    if not options.no_peers and not peers.present():
        peers.reexecute("benchmarks.vision_step", sys.argv[1:])
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.vision_step", *sys.argv[1:]]),
        **versions_and_machine(),
        "repeats": options.repeats or (2 if options.quick else 5),
        "cells": [],
    }
    for size in SIZES:
        asked = replace(size, **QUICK) if options.quick else size
        report["cells"].append(measure(asked, report["repeats"], not options.no_peers))
        report["goals"] = judge(report["cells"])
        write(options.json, report)
    show(report["cells"])
    sys.stdout.flush()
    print(last_line("vision_step", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
