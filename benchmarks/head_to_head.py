"""One distillation step of `opd` against TRL's trainers: `python -m benchmarks.head_to_head --json PATH`.

The same models, prompts, lengths of completions, batch, sampling settings, optimiser and divergence (reverse KL); every
library through its own training loop, in a process of its own, stepping in turns. TRL's `DistillationTrainer` runs as
it is shipped and with the tile that is fastest here; its GKD trainer steps after the others, since logits of a whole
batch leave no memory for them. Checkpointing is off on all sides. With all cores only `opd` and TRL as shipped run. In
float32 all losses on equal completions must agree to 1e-5.

What counts as which phase: `rollout` is everything from prompts to completions; `teacher` and `student` are the bodies
(TRL GKD: with the head); `loss` is both heads and the divergence, and with opd the gradients of hidden states and head
too, which the others make in `backward`; `optimizer` is clipping and AdamW; `rest` is what a loop does besides.

`--device cuda` times wall clock with the device awaited at every phase's end, one contestant after the other. Its size
`qwen3` (random weights made there) is run by opd alone and reported as a share of the card's matrix throughput.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.alternation import Worker, compete, peak_memory, versions_and_machine, write
from benchmarks.contestants import GKD, OPD, TILES, TRL, TRL_TILED
from benchmarks.loss_operator import finished_cells
from benchmarks.phases import over
from benchmarks.session import Job
from benchmarks.sizes import ON_DEVICE, SIZES, Size, materialise
from benchmarks.utilisation import peak_throughput, products

LOSS_TOLERANCE = 1e-5
GOALS = {"tiny": 1.0, "medium": 2.0, "smollm2": 3.0}
"""CPU of TRL as shipped over opd's, one thread, float32: at least."""
MEMORY_GOAL = 2.0
"""Peak memory of TRL as shipped over opd's at SmolLM2 size: at least."""
QUICK = {"batch": 8, "longest": 64}
WARM = 10.0
"""Seconds of a pass beside which warming up is nothing."""


def best_tile(size: Size, precision: str, device: str) -> tuple[int, dict[int, float]]:
    """TRL's fastest tile for this size: seconds of its loss and backward on given completions, the
    second time where the first was short."""
    seconds, clock = {}, "cpu" if device == "cpu" else "wall"
    for tile in TILES:
        progress(f"{size.name} {precision}: TRL at {tile} rows")
        worker = Worker(Job(TRL_TILED, size, precision, tile=tile, device=device))
        try:
            worker.ask()
            spent = worker.ask("score")["seconds"][clock]
            if sum(spent.values()) < WARM:
                spent = worker.ask("score")["seconds"][clock]
        finally:
            worker.close()
        seconds[tile] = spent["loss"] + spent["backward"]
    return min(seconds, key=seconds.__getitem__), seconds


def measure(size: Size, precision: str, repeats: int, cores: int, device: str, alone: bool) -> dict[str, Any]:
    """One cell of the table: tiles, scores, steps with one thread and with all cores, and memory."""
    materialise(size)
    tile, tiles = (None, {}) if alone else best_tile(size, precision, device)
    cell: dict[str, Any] = {"size": asdict(size), "precision": precision, "tiles": tiles, "tile": tile, "threads": {}}
    cell["device"] = device

    def job(name: str, threads: int) -> Job:
        return Job(name, size, precision, threads, tile if name == TRL_TILED else None, device)

    names = (OPD,) if alone else (OPD, TRL, TRL_TILED, GKD)
    all_threads = sorted({1, cores}) if device == "cpu" else [cores]
    for threads in all_threads:
        where = f"{size.name} {precision}, {threads} threads"
        # GKD's logits of a whole batch leave no memory for the others beside it.
        groups = [names[:3], names[3:]] if threads == all_threads[0] else [names[:2]]
        cell["threads"][str(threads)] = {}
        for group in filter(None, groups):
            jobs = [job(name, threads) for name in group]
            found = compete(jobs, repeats, lambda text, where=where: progress(f"{where}: {text}"))
            cell["threads"][str(threads)] |= found
    found = cell["threads"][str(all_threads[0])]
    cell["memory"] = {}
    for name in names:
        progress(f"{size.name} {precision}: memory of {name}")
        steps = found[name]["steps"]
        cell["memory"][name] = (
            peak_memory(job(name, 1))
            if device == "cpu"
            else {"loaded_bytes": found[name]["loaded_bytes"], "peak_bytes": max(s["peak_bytes"] for s in steps)}
        )
    if size.made:
        cell["utilisation"] = utilisation(size, precision, device, found[OPD]["steps"])
    scores = {name: figures["score"] for name, figures in found.items()}
    own = scores.pop(OPD)
    cell["loss_error"] = {name: abs(score["loss"] / own["loss"] - 1) for name, score in scores.items()}
    cell["gradient_error"] = {
        name: abs(score["gradient_component"] - own["gradient_component"]) / own["gradient_norm"]
        for name, score in scores.items()
    }
    return cell


def utilisation(size: Size, precision: str, device: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of the measured matrix throughput that each phase reaches, and a step in all; the first step warmed up."""
    peak = peak_throughput(torch.bfloat16 if precision == "bf16" else torch.float32, device)
    clock = "cpu" if device == "cpu" else "wall"
    work = [products(size, step) for step in range(1, len(steps) + 1)]
    shares = {p: over(sum(w[p] for w in work), sum(s[clock][p] for s in steps)) / peak for p in work[0]}
    whole = over(sum(sum(w.values()) for w in work), sum(sum(s[clock].values()) for s in steps)) / peak
    return {"peak_operations_per_second": peak, "by_phase": shares, "step": whole}


def judge(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals; `met` is None where one was not measured."""
    goals = []
    # The ratios were set for a CPU.
    exact = {c["size"]["name"]: c for c in cells if c["precision"] == "fp32" and c["device"] == "cpu"}
    for name, target in GOALS.items():
        figure = None
        if name in exact and TRL in exact[name]["memory"]:
            of = exact[name]["threads"]["1"]
            figure = of[TRL]["cpu_seconds"] / of[OPD]["cpu_seconds"]
        goals.append(_goal(f"{name}: CPU of TRL as shipped / opd >= {target:g}", figure, target))
    figure = None
    if "smollm2" in exact and TRL in exact["smollm2"]["memory"]:
        memory = exact["smollm2"]["memory"]
        figure = memory[TRL]["peak_bytes"] / memory[OPD]["peak_bytes"]
    goals.append(_goal(f"smollm2: peak memory of TRL as shipped / opd >= {MEMORY_GOAL:g}", figure, MEMORY_GOAL))
    errors = [error for cell in cells if cell["precision"] == "fp32" for error in cell["loss_error"].values()]
    worst = max(errors, default=None)
    met = None if worst is None else worst <= LOSS_TOLERANCE
    goals.append({"goal": f"losses on equal completions equal to {LOSS_TOLERANCE:g}", "figure": worst, "met": met})
    return goals


def _goal(text: str, figure: float | None, target: float) -> dict[str, Any]:
    return {"goal": text, "figure": figure, "met": None if figure is None else figure >= target}


def last_line(name: str, goals: list[dict[str, Any]]) -> str:
    """Figures and goals on one line."""
    words = {None: "not measured", True: "met", False: "MISSED"}
    parts = [
        f"{g['goal']}: " + ("" if g["figure"] is None else f"{g['figure']:.3g}, ") + words[g["met"]] for g in goals
    ]
    return f"{name}: " + "; ".join(parts)


def show(cells: list[dict[str, Any]]) -> None:
    """One table a cell and thread count."""
    console = Console(width=max(170, Console().width))
    for cell in cells:
        for threads, contestants in cell["threads"].items():
            phases = ("rollout", "teacher", "student", "loss", "backward", "optimizer", "rest")
            clock = "cpu" if cell["device"] == "cpu" else "wall"
            title = f"{cell['size']['name']} {cell['precision']}, {cell['device']}, threads: {threads}; seconds a step"
            table = Table(title=title)
            for column in ("", "CPU (range)", "wall", *phases, "tokens/CPU s", "tokens/s", "peak MB", "loss error"):
                table.add_column(column, justify="right")
            for name, of in contestants.items():
                low, high = of["cpu_range"]
                error = cell["loss_error"].get(name)
                table.add_row(
                    name,
                    f"{of['cpu_seconds']:.3g} ({low:.3g}-{high:.3g})",
                    f"{of['wall_seconds']:.3g}",
                    *(f"{of[f'{clock}_by_phase'].get(phase, 0):.3g}" for phase in phases),
                    f"{of['tokens_per_cpu_second']:.0f}",
                    f"{of['tokens_per_wall_second']:.0f}",
                    f"{cell['memory'][name]['peak_bytes'] / 1e6:.0f}",
                    "" if error is None else f"{error:.0e}",
                )
            console.print(table)
        if "utilisation" in cell:
            of = cell["utilisation"]
            shares = ", ".join(f"{phase} {share:.0%}" for phase, share in of["by_phase"].items())
            console.print(
                f"of {of['peak_operations_per_second'] / 1e12:.3g} TFLOP/s: {shares}, a step {of['step']:.0%}"
            )


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_to_head", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two repeats of eight completions of up to 64 tokens")
    parser.add_argument(
        "--size",
        choices=(*SIZES, *ON_DEVICE),
        nargs="+",
        help=f"default: tiny with --quick, else {', '.join(SIZES)}, on cuda qwen3 too",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-peers", action="store_true", help="opd alone")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", help="default: fp32, at smollm2 both")
    parser.add_argument("--repeats", type=int, help="timed steps of each contestant; default 5, or 2 with --quick")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--resume", action="store_true", help="keep the cells that a run cut short left in --json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; take --device cpu")
    names = options.size or (["tiny"] if options.quick else [*SIZES, *(["qwen3"] if options.device == "cuda" else [])])
    known = {**SIZES, **ON_DEVICE}
    sizes = [replace(known[name], **QUICK) if options.quick else known[name] for name in names]
    for size in sizes:
        materialise(size)  # SmolLM2 is read by opd's environment, before the peers' takes over
    alone = options.no_peers or all(size.made for size in sizes)
    if not alone and not peers.present():
        peers.reexecute("benchmarks.head_to_head", sys.argv[1:])
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.head_to_head", *sys.argv[1:]]),
        **versions_and_machine(options.device),
        "repeats": options.repeats or (2 if options.quick else 5),
        "cells": [],
    }
    if options.resume:
        report["cells"] = finished_cells(options.json, report, ("versions", "repeats"))
    done = {(cell["size"]["name"], cell["precision"]) for cell in report["cells"]}
    for size in sizes:
        usual = ("bf16",) if size.made else ("fp32", "bf16") if size.name == "smollm2" else ("fp32",)
        for precision in options.precision or usual:
            if (size.name, precision) in done:
                continue
            cores = len(os.sched_getaffinity(0))
            report["cells"].append(
                measure(size, precision, report["repeats"], cores, options.device, alone or size.made)
            )
            report["goals"] = judge(report["cells"])
            write(options.json, report)
    report["goals"] = judge(report["cells"])
    show(report["cells"])
    sys.stdout.flush()
    print(last_line("head_to_head", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
