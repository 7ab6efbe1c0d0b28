"""`opd`'s step over the floor, and how busy the arithmetic is: `python -m benchmarks.floor --json PATH`.

The floor (`benchmarks/bare.py`) does only what cannot be left out, in plain torch. Both step in turns on the same
prompts and lengths. Utilisation of a phase is the operations of its matrix products (multiplications and additions)
over what the machine was measured to do in the same CPU seconds with the same dtype and thread count.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.alternation import compete, versions_and_machine, write
from benchmarks.contestants import FLOOR, OPD
from benchmarks.head_to_head import QUICK, last_line, progress
from benchmarks.loss_operator import finished_cells
from benchmarks.phases import over
from benchmarks.session import Job
from benchmarks.sizes import SIZES, Size, materialise
from benchmarks.utilisation import peak_throughput, products

GOAL = 1.15
"""CPU of opd's step over the floor's at SmolLM2 size, float32: at most."""


def measure(size: Size, precision: str, repeats: int) -> dict[str, Any]:
    """One cell: both sides' steps, the ratio, and utilisation by phase."""
    materialise(size)
    where = f"{size.name} {precision}"
    jobs = [Job(name, size, precision) for name in (OPD, FLOOR)]
    found = compete(jobs, repeats, lambda text: progress(f"{where}: {text}"))
    torch.set_num_threads(1)
    peak = peak_throughput(torch.bfloat16 if precision == "bf16" else torch.float32)
    work = [products(size, step) for step in range(1, repeats + 1)]  # step 0 warms up
    for figures in found.values():
        figures["utilisation"] = {
            phase: over(sum(w[phase] for w in work), sum(s["cpu"][phase] for s in figures["steps"])) / peak
            for phase in work[0]
        }
    scores = [found[name]["score"]["loss"] for name in (OPD, FLOOR)]
    return {
        "size": asdict(size),
        "precision": precision,
        "contestants": found,
        "over_floor": found[OPD]["cpu_seconds"] / found[FLOOR]["cpu_seconds"],
        "peak_operations_per_second": peak,
        "loss_error": abs(scores[1] / scores[0] - 1),
    }


def judge(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goal at SmolLM2 size, and equal losses everywhere."""
    exact = {c["size"]["name"]: c for c in cells if c["precision"] == "fp32"}
    figure = exact["smollm2"]["over_floor"] if "smollm2" in exact else None
    errors = [c["loss_error"] for c in exact.values()]
    return [
        {
            "goal": f"smollm2: CPU of opd / floor <= {GOAL:g}",
            "figure": figure,
            "met": None if figure is None else figure <= GOAL,
        },
        {
            "goal": "losses on equal completions equal to 1e-05",
            "figure": max(errors, default=None),
            "met": max(errors) <= 1e-5 if errors else None,
        },
    ]


def show(cells: list[dict[str, Any]]) -> None:
    """CPU seconds and utilisation of each phase."""
    table = Table(title="CPU seconds a step (utilisation of the measured peak), one thread")
    phases = ("rollout", "teacher", "student", "loss", "backward", "optimizer", "rest")
    for column in ("size", "", "step", *phases, "over floor"):
        table.add_column(column, justify="right")
    for cell in cells:
        for name, of in cell["contestants"].items():
            shown = [
                f"{of['cpu_by_phase'].get(phase, 0):.3g}"
                + (f" ({of['utilisation'][phase]:.0%})" if phase in of["utilisation"] else "")
                for phase in phases
            ]
            over = f"{cell['over_floor']:.2f}" if name == OPD else ""
            table.add_row(f"{cell['size']['name']} {cell['precision']}", name, f"{of['cpu_seconds']:.3g}", *shown, over)
    Console(width=max(160, Console().width)).print(table)


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two repeats of eight completions of up to 64 tokens")
    parser.add_argument("--size", choices=tuple(SIZES), nargs="+", help="default: tiny with --quick, else all")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", help="default: fp32, at smollm2 both")
    parser.add_argument("--repeats", type=int, help="timed steps of each side; default 5, or 2 with --quick")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--resume", action="store_true", help="keep the cells that a run cut short left in --json")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.floor", *sys.argv[1:]]),
        **versions_and_machine(),
        "repeats": options.repeats or (2 if options.quick else 5),
        "cells": [],
    }
    if options.resume:
        report["cells"] = finished_cells(options.json, report, ("versions", "repeats"))
    done = {(cell["size"]["name"], cell["precision"]) for cell in report["cells"]}
    for name in options.size or (["tiny"] if options.quick else list(SIZES)):
        size = replace(SIZES[name], **QUICK) if options.quick else SIZES[name]
        for precision in options.precision or (("fp32", "bf16") if name == "smollm2" else ("fp32",)):
            if (name, precision) in done:
                continue
            report["cells"].append(measure(size, precision, report["repeats"]))
            report["goals"] = judge(report["cells"])
            write(options.json, report)
    report["goals"] = judge(report["cells"])
    show(report["cells"])
    sys.stdout.flush()
    print(last_line("floor", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
