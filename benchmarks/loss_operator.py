"""The loss operator against its peers: `python -m benchmarks.loss_operator --json PATH`.

What is compared is one loss and its gradients in the student's hidden states and output head, from hidden states and
heads of both models, on equal inputs. Every contestant is called as its own trainer would call it and masks positions
in its own way. CPU seconds are taken in one process with the contestants alternating, so that a busy machine slows all
of them alike; peak memory is taken in a fresh process for each number.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import isolated, peers
from benchmarks.phases import synchronise
from opd.distributions import Categorical, Head
from opd.divergences import ForwardKL, JensenShannon, OnSupport, ReverseKL, Target, divergence_loss
from opd.operator import memory_bound

POSITIONS = 1024
STUDENT_WIDTH, TEACHER_WIDTH = 256, 512
VOCABULARIES = (8192, 32768, 49152, 151936)
MASKED = (0.0, 0.5, 0.9)
SCALING_VOCABULARIES = (8192, 16384, 32768, 65536, 151936)
SCALING_POSITIONS = (64, 256, 1024, 4096, 8192)
SCALING_VOCABULARY = 32768
LOGIT_DEVIATION = 2.0
EQUAL_ROWS = 128
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
NOISE = 0.03
PRELOAD = ["opd.divergences", "trl.trainer.distillation_trainer", "liger_kernel.chunked_loss"]


@dataclass(frozen=True)
class Objective:
    """One divergence under every library's name for it.

    TRL and Liger share a convention: beta 0 is forward KL, 1 reverse KL, and between them the teacher carries beta in
    the mixture, as in opd's `jensen_shannon`.
    """

    divergence: OnSupport
    beta: float


OBJECTIVES = {
    "forward_kl": Objective(ForwardKL(), 0.0),
    "reverse_kl": Objective(ReverseKL(), 1.0),
    "jensen_shannon": Objective(JensenShannon(beta=0.5), 0.5),
}


@dataclass(frozen=True)
class Inputs:
    """What every contestant is given; `hidden` and `weight` are the leaves that receive gradients."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor
    counts: torch.Tensor
    """bool `[N]`: positions that are not masked."""

    @staticmethod
    def make(positions: int, vocabulary: int, device: str, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int, width: int, deviation: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, width, generator=generator).mul_(deviation).to(device)

        return Inputs(
            hidden=normal(positions, STUDENT_WIDTH).requires_grad_(),
            weight=normal(vocabulary, STUDENT_WIDTH, LOGIT_DEVIATION / STUDENT_WIDTH**0.5).requires_grad_(),
            teacher_hidden=normal(positions, TEACHER_WIDTH),
            teacher_weight=normal(vocabulary, TEACHER_WIDTH, LOGIT_DEVIATION / TEACHER_WIDTH**0.5),
            labels=torch.randint(vocabulary, (positions,), generator=generator).to(device),
            counts=torch.ones(positions, dtype=torch.bool, device=device),
        )

    def masked(self, share: float, seed: int = 1) -> Inputs:
        """The same inputs with a random share of the positions masked."""
        generator = torch.Generator().manual_seed(seed)
        positions = len(self.labels)
        counts = torch.ones(positions, dtype=torch.bool)
        counts[torch.randperm(positions, generator=generator)[: round(share * positions)]] = False
        return replace(self, counts=counts.to(self.counts.device))

    def double(self) -> Inputs:
        """The same numbers in float64, for the reference."""
        return replace(
            self,
            hidden=self.hidden.detach().double().requires_grad_(),
            weight=self.weight.detach().double().requires_grad_(),
            teacher_hidden=self.teacher_hidden.double(),
            teacher_weight=self.teacher_weight.double(),
        )


# Every contestant is a function of inputs, objective and rows (None: as shipped) that runs forward and backward, leaves
# the gradients in `inputs.hidden.grad` and `inputs.weight.grad`, and returns the mean over positions that count.


def _opd(inputs: Inputs, objective: Objective, rows: int | None) -> torch.Tensor:
    weights = inputs.counts.float() / inputs.counts.sum()
    student = Categorical(inputs.hidden, Head(inputs.weight))
    target = Target(Categorical(inputs.teacher_hidden, Head(inputs.teacher_weight)))
    lengths = torch.tensor([len(inputs.labels)])
    loss = divergence_loss(objective.divergence, student, [target], weights, inputs.labels, lengths, rows).total
    loss.backward()
    return loss.detach()


def _trl(inputs: Inputs, objective: Objective, rows: int | None) -> torch.Tensor:
    from trl.kernels import chunked_divergence
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    # Its chunk is a constant of the module that forward and backward both read.
    chunk = rows or chunked_divergence.TOKEN_CHUNK_SIZE
    with mock.patch.object(chunked_divergence, "TOKEN_CHUNK_SIZE", chunk):
        loss, _, _ = _chunked_divergence_loss(
            inputs.hidden[None],
            inputs.teacher_hidden[None],
            inputs.weight,
            inputs.teacher_weight,
            inputs.counts[None],
            objective.beta,
        )
        loss.backward()
    return loss.detach()


def _liger(inputs: Inputs, objective: Objective, rows: int | None) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    chunk = {} if rows is None else {"chunk_size": rows}
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=objective.beta, compiled=False, **chunk
    )
    labels = inputs.labels.masked_fill(~inputs.counts, -100)
    loss = module(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, labels)
    loss.backward()
    return loss.detach()


def _full_logits(inputs: Inputs, objective: Objective, rows: int | None) -> torch.Tensor:
    """Logits of every position, as a model's forward returns them; the divergence where positions count."""
    student = inputs.hidden @ inputs.weight.T
    with torch.no_grad():
        teacher = inputs.teacher_hidden @ inputs.teacher_weight.T
    loss = _definition(objective.beta, teacher[inputs.counts], student[inputs.counts]).mean()
    loss.backward()
    return loss.detach()


def _definition(beta: float, teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    """The textbook divergence at each row, for autograd, in the dtype of the logits."""
    log_p, log_q = torch.log_softmax(teacher_logits, -1), torch.log_softmax(student_logits, -1)
    if beta == 0.0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1.0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher_side = (log_p.exp() * (log_p - log_m)).sum(-1)
    student_side = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * teacher_side + (1 - beta) * student_side


@dataclass(frozen=True)
class Contestant:
    """A library at one chunk size."""

    library: str
    run: Callable[[Inputs, Objective, int | None], torch.Tensor]
    rows: int | None = None

    def __call__(self, inputs: Inputs, objective: Objective) -> torch.Tensor:
        inputs.hidden.grad = inputs.weight.grad = None
        return self.run(inputs, objective, self.rows)


OPD, OPD_EQUAL = "opd", f"opd, {EQUAL_ROWS} rows"
TRL, TRL_EQUAL = "TRL", f"TRL, {EQUAL_ROWS} rows"
LIGER, LIGER_EQUAL = "Liger", f"Liger, {EQUAL_ROWS} rows"
FULL = "full logits"
CONTESTANTS = {
    OPD: Contestant("opd", _opd),
    OPD_EQUAL: Contestant("opd", _opd, EQUAL_ROWS),
    TRL: Contestant("trl", _trl),
    TRL_EQUAL: Contestant("trl", _trl, EQUAL_ROWS),
    LIGER: Contestant("liger-kernel", _liger),
    LIGER_EQUAL: Contestant("liger-kernel", _liger, EQUAL_ROWS),
    FULL: Contestant("torch", _full_logits),
}
OWN = (OPD, OPD_EQUAL, FULL)


# Correctness


def check_correctness(names: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Every contestant's loss and gradients against full logits in float64, at a size where that is cheap.

    There are enough positions for two chunks of `EQUAL_ROWS` even with half of them masked.
    """
    base = Inputs.make(positions=320, vocabulary=2048, device=device, seed=2)
    results = []
    for share, (kind, objective) in itertools.product((0.0, 0.5), OBJECTIVES.items()):
        inputs = base.masked(share)
        exact = inputs.double()
        loss = _full_logits(exact, objective, None)
        for name in names:
            got = CONTESTANTS[name](inputs, objective)
            results.append(
                {
                    "contestant": name,
                    "objective": kind,
                    "masked": share,
                    "loss_error": _relative(got, loss),
                    "hidden_gradient_error": _relative(inputs.hidden.grad, exact.hidden.grad),
                    "head_gradient_error": _relative(inputs.weight.grad, exact.weight.grad),
                }
            )
    return results


def _relative(got: torch.Tensor | None, want: torch.Tensor | None) -> float:
    assert got is not None
    assert want is not None
    return float((got.double() - want).norm() / want.norm())


def exact_values(inputs: Inputs, objectives: Sequence[str], rows: int = 32) -> dict[str, torch.Tensor]:
    """float64 `[N]` divergences of every objective, a few rows at a time: what the losses of a cell must agree with."""
    values: dict[str, list[torch.Tensor]] = {kind: [] for kind in objectives}
    with torch.no_grad():
        student_head, teacher_head = inputs.weight.double().T, inputs.teacher_weight.double().T
        for start in range(0, len(inputs.labels), rows):
            student = inputs.hidden[start : start + rows].double() @ student_head
            teacher = inputs.teacher_hidden[start : start + rows].double() @ teacher_head
            for kind in objectives:
                values[kind].append(_definition(OBJECTIVES[kind].beta, teacher, student))
    return {kind: torch.cat(parts) for kind, parts in values.items()}


# Time and memory


def time_cell(
    names: Sequence[str], inputs: Inputs, objective: Objective, repeats: int, exact: float, device: str
) -> dict[str, dict[str, Any]]:
    """Seconds of every contestant, alternating, after one warm-up each that also checks what it computes."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    figures: dict[str, dict[str, Any]] = {}
    own_gradients: tuple[torch.Tensor, torch.Tensor] | None = None
    for name in names:
        loss = float(CONTESTANTS[name](inputs, objective))
        hidden, weight = inputs.hidden.grad, inputs.weight.grad
        assert hidden is not None
        assert weight is not None
        own_gradients = own_gradients or (hidden, weight)
        error = abs(loss - exact) / abs(exact)
        gap = max(_relative(hidden, own_gradients[0]), _relative(weight, own_gradients[1]))
        figures[name] = {
            "loss": loss,
            "loss_error": error,
            "gradient_distance_to_opd": gap,
            "agrees": error <= LOSS_TOLERANCE,
            "seconds": [],
        }
    del own_gradients, hidden, weight
    for _ in range(repeats):
        for name in names:
            gc.collect()
            inputs.hidden.grad = inputs.weight.grad = None
            synchronise(device)
            start = clock()
            CONTESTANTS[name](inputs, objective)
            synchronise(device)
            figures[name]["seconds"].append(clock() - start)
    inputs.hidden.grad = inputs.weight.grad = None
    for figure in figures.values():
        figure["median_seconds"] = statistics.median(figure["seconds"])
    return figures


def prepare(
    name: str, kind: str, positions: int, vocabulary: int, masked: float, device: str
) -> tuple[isolated.Call, isolated.Call]:
    """What a process that measures memory runs: the contestant on small inputs, then on those that count.

    The small ones are large enough for the matrix library to allocate its workspace (some MB, kept for good), which a
    training process has long had from the model's own products.
    """
    contestant, objective = CONTESTANTS[name], OBJECTIVES[kind]
    small = Inputs.make(512, 8192, device)
    inputs = Inputs.make(positions, vocabulary, device).masked(masked)
    return functools.partial(contestant, small, objective), functools.partial(contestant, inputs, objective)


def measure_scaling(device: str) -> list[dict[str, Any]]:
    """Peak memory of opd and of full logits against vocabulary and against positions, and opd's stated bound."""
    sizes = [("vocabulary", POSITIONS, v) for v in SCALING_VOCABULARIES]
    sizes += [("positions", t, SCALING_VOCABULARY) for t in SCALING_POSITIONS]
    curves = [(OPD, "reverse_kl"), (OPD, "jensen_shannon"), (FULL, "reverse_kl")]
    points = []
    for along, positions, vocabulary in sizes:
        for name, kind in curves:
            point: dict[str, Any] = {
                "along": along,
                "positions": positions,
                "vocabulary": vocabulary,
                "contestant": name,
                "objective": kind,
                "bytes": None,
            }
            if name == OPD:
                point["bound_bytes"] = stated_bound(kind, positions, vocabulary)
            if name != FULL or 8 * 4 * positions * vocabulary < _free_memory(device):
                _progress(f"memory of {name}, {kind}, T={positions}, V={vocabulary}")
                arguments = (name, kind, positions, vocabulary, 0.0, device)
                point["bytes"] = isolated.peak_memory(prepare, arguments, device).growth
            points.append(point)
    return points


def stated_bound(kind: str, positions: int, vocabulary: int) -> int:
    """What the docstring of `divergence_loss` allows: the wider model counts for rows, the student for its head."""
    width = max(STUDENT_WIDTH, TEACHER_WIDTH)
    beside_head = memory_bound(OBJECTIVES[kind].divergence, positions, width, vocabulary, trained=False)
    return beside_head + 4 * vocabulary * STUDENT_WIDTH


def _free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


# Goals


def judge(cells: list[dict[str, Any]], correctness: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The goals with their figures; `met` is None where a goal was not measured or does not apply to the device."""
    large = [c for c in cells if c["vocabulary"] >= 32768]
    dense = [c for c in large if c["masked"] == 0.0]
    half = [c for c in large if c["masked"] == 0.5]
    goals = [
        _ratio_goal("a", "CPU of TRL as shipped / opd, V >= 32768, nothing masked", dense, TRL, OPD, 2.0, "seconds"),
        _ratio_goal("b", "memory of TRL as shipped / opd, V >= 32768, nothing masked", dense, TRL, OPD, 5.0, "memory"),
        _ratio_goal("c", "CPU of TRL as shipped / opd, V >= 32768, half masked", half, TRL, OPD, 4.0, "seconds"),
        _ratio_goal(
            "d", f"CPU of Liger / opd at {EQUAL_ROWS} rows, all cells", cells, LIGER_EQUAL, OPD_EQUAL, 1.0, "seconds"
        ),
    ]
    if device == "cuda":  # the four targets were set for CPU, where TRL projects masked rows too
        goals = [{**goal, "met": None} for goal in goals]
    own = [c for c in correctness if CONTESTANTS[c["contestant"]].library == "opd"]
    worst = max(max(c["hidden_gradient_error"], c["head_gradient_error"]) for c in own)
    goals.append(
        {
            "goal": f"(e) worst gradient of opd against float64 full logits <= {GRADIENT_TOLERANCE:.0e}",
            "figure": worst,
            "met": worst <= GRADIENT_TOLERANCE,
        }
    )
    return goals


def _ratio_goal(
    letter: str, what: str, cells: list[dict[str, Any]], other: str, own: str, target: float, figure: str
) -> dict[str, Any]:
    key = "median_seconds" if figure == "seconds" else "peak_bytes"
    slack = NOISE if letter == "d" else 0.0
    wanted = f"({letter}) {what}: worst cell >= {target:g}" + (f" less {slack:.0%} noise" if slack else "")
    cells = [c for c in cells if {other, own} <= c["contestants"].keys()]
    strays = [n for c in cells for n in (other, own) if not c["contestants"][n]["agrees"]]
    ratios = [c["contestants"][other][key] / c["contestants"][own][key] for c in cells]
    goal: dict[str, Any] = {"goal": wanted, "figure": None, "median": None, "cells": len(cells), "met": None}
    if ratios:
        goal |= {"figure": min(ratios), "median": statistics.median(ratios), "met": min(ratios) >= target - slack}
    if strays:
        goal |= {"met": False, "reason": f"{', '.join(sorted(set(strays)))} computes something else"}
    return goal


def last_line(goals: list[dict[str, Any]]) -> str:
    """Figures and goals on one line."""
    words = {True: "met", False: "MISSED", None: "not judged"}
    parts = []
    for goal in goals:
        if goal["figure"] is None:
            parts.append(f"{goal['goal']}: not measured")
            continue
        figure = f"{goal['figure']:.3g}"
        if goal.get("median") is not None:
            figure += f" (median {goal['median']:.3g} of {goal['cells']} cells)"
        parts.append(f"{goal['goal']}: {figure}, {goal.get('reason', words[goal['met']])}")
    return "loss operator: " + "; ".join(parts)


# Report


def show(cells: list[dict[str, Any]], correctness: list[dict[str, Any]], names: Sequence[str], device: str) -> None:
    """The three tables, wide enough for a file."""
    console = Console(width=max(190, Console().width))
    table = Table(title="worst relative error against float64 full logits (320 positions, V=2048)")
    for column in ("contestant", "loss", "gradient in hidden states", "gradient in head", "verdict"):
        table.add_column(column)
    for name in names:
        rows = [c for c in correctness if c["contestant"] == name]
        worst = [max(c[k] for c in rows) for k in ("loss_error", "hidden_gradient_error", "head_gradient_error")]
        verdict = "agrees" if worst[0] <= LOSS_TOLERANCE else "computes something else"
        table.add_row(name, *(f"{w:.1e}" for w in worst), verdict)
    console.print(table)

    unit = "wall seconds on the device" if device == "cuda" else "CPU seconds, one thread"
    table = Table(title=f"{unit}: median (lowest-highest)")
    for column in ("V", "masked", "objective", *names):
        table.add_column(column, justify="right")
    for cell in cells:
        table.add_row(*_place(cell), *(_seconds(cell["contestants"][name]) for name in names))
    console.print(table)

    table = Table(title="peak memory over inputs, MB (gradients of both leaves included)")
    for column in ("V", "masked", "objective", *names):
        table.add_column(column, justify="right")
    for cell in cells:
        table.add_row(*_place(cell), *(f"{cell['contestants'][n]['peak_bytes'] / 1e6:.0f}" for n in names))
    console.print(table)


def show_scaling(points: list[dict[str, Any]]) -> None:
    """Peak memory against size, and how often opd kept within the bound that it states."""
    table = Table(title="peak memory against size, MB")
    for column in ("T", "V", "contestant", "objective", "peak", "stated bound"):
        table.add_column(column, justify="right")
    for point in points:
        sizes = str(point["positions"]), str(point["vocabulary"])
        peak = "not enough memory" if point["bytes"] is None else f"{point['bytes'] / 1e6:.0f}"
        bound = f"{point['bound_bytes'] / 1e6:.0f}" if "bound_bytes" in point else ""
        table.add_row(*sizes, point["contestant"], point["objective"], peak, bound)
    own = [p for p in points if "bound_bytes" in p]
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print(f"within the stated bound: {sum(p['bytes'] <= p['bound_bytes'] for p in own)} of {len(own)} points")


def _place(cell: dict[str, Any]) -> tuple[str, str, str]:
    return str(cell["vocabulary"]), f"{cell['masked']:.0%}", cell["objective"]


def _seconds(figure: dict[str, Any]) -> str:
    if not figure["agrees"]:
        return f"computes something else: loss off by {figure['loss_error']:.1e}"
    return f"{figure['median_seconds']:.2f} ({min(figure['seconds']):.2f}-{max(figure['seconds']):.2f})"


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Two panels: peak memory against vocabulary and against positions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {
        (FULL, "reverse_kl"): ("full logits, reverse KL", "#b3443c", "s"),
        (OPD, "jensen_shannon"): ("opd, JSD", "#3c8d5a", "^"),
        (OPD, "reverse_kl"): ("opd, reverse KL", "#2f5fa8", "o"),
    }
    panels_by = {
        "vocabulary": ("vocabulary V", f"{POSITIONS} positions"),
        "positions": ("positions T", f"vocabulary {SCALING_VOCABULARY}"),
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained", sharey=True)
    for panel, (along, (axis, title)) in zip(panels, panels_by.items(), strict=True):
        for (name, kind), (label, colour, marker) in curves.items():
            mine = [p for p in points if (p["along"], p["contestant"], p["objective"]) == (along, name, kind)]
            measured = [(p[along], p["bytes"] / 1e6) for p in mine if p["bytes"] is not None]
            panel.plot(*zip(*measured, strict=True), color=colour, marker=marker, label=label)
            if name == OPD:
                bound = [p["bound_bytes"] / 1e6 for p in mine]
                panel.plot(
                    [p[along] for p in mine], bound, color=colour, linestyle="--", label=f"{label}: stated bound"
                )
        ticks = sorted({p[along] for p in points if p["along"] == along})
        panel.set(xscale="log", yscale="log", xlabel=axis, title=title)
        panel.set_xticks(ticks, [str(t) for t in ticks])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("peak memory over inputs, MB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Memory of loss and gradients, trained head included (float32)")
    figure.savefig(path, dpi=150)


def describe_machine(device: str) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    machine = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads_used": torch.get_num_threads(),
        "load_average": os.getloadavg(),
    }
    return machine | ({"accelerator": torch.cuda.get_device_name()} if device == "cuda" else {})


def versions() -> dict[str, str]:
    """Versions of everything that takes part."""
    found = {"python": platform.python_version()}
    for name in ("opd", "torch", "trl", "liger-kernel", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def finished_cells(
    path: Path, report: dict[str, Any], same: Sequence[str], part: str = "cells"
) -> list[dict[str, Any]]:
    """The `part` of an earlier report at `path`; those named `same` must be what they are in this one."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in same:
        if before[name] != json.loads(json.dumps(report[name])):
            sys.exit(f"--resume: {path} was measured with other {name}; give another --json or remove the file")
    return list(before[part])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_operator", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two vocabularies, two masked shares, two objectives")
    parser.add_argument("--repeats", type=int, help="timed repeats of each cell; default 5, or 3 with --quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--scaling", type=Path, help="measure memory against V and T, and draw it to this PNG")
    parser.add_argument("--vocabulary", type=int, nargs="+", help="only these sizes of vocabulary")
    parser.add_argument("--masked", type=float, choices=MASKED, nargs="+", help="only these shares of masked rows")
    parser.add_argument("--no-peers", action="store_true", help="opd and full logits alone")
    parser.add_argument("--contestants", choices=tuple(CONTESTANTS), nargs="+", help=f"only these and {OPD!r}")
    parser.add_argument("--resume", action="store_true", help="keep the cells that a run cut short left in --json")
    return parser.parse_args()


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    options = _arguments()
    if not options.no_peers and not peers.present():
        peers.reexecute("benchmarks.loss_operator", sys.argv[1:])
    torch.set_num_threads(1)
    isolated.preload(PRELOAD[:1] if options.no_peers else PRELOAD)
    names = list(OWN if options.no_peers else CONTESTANTS)
    if options.contestants:
        names = [name for name in names if name in (OPD, *options.contestants)]
    vocabularies = options.vocabulary or (VOCABULARIES[:2] if options.quick else VOCABULARIES)
    shares = options.masked or (MASKED[:2] if options.quick else MASKED)
    kinds = list(OBJECTIVES)[1:] if options.quick else list(OBJECTIVES)
    repeats = options.repeats or (3 if options.quick else 5)

    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.loss_operator", *sys.argv[1:]]),
        "versions": versions(),
        "machine": describe_machine(options.device),
        "settings": {
            "positions": POSITIONS,
            "student_width": STUDENT_WIDTH,
            "teacher_width": TEACHER_WIDTH,
            "dtype": "float32",
            "repeats": repeats,
            "clock": "wall, synchronised" if options.device == "cuda" else "CPU of the process",
        },
        "correctness": check_correctness(names, options.device),
        "cells": [],
        "scaling": [],
        "goals": [],
    }
    if options.resume:
        report["cells"] = finished_cells(options.json, report, ("settings", "versions"))
    done = {(c["vocabulary"], c["masked"], c["objective"]) for c in report["cells"]}
    for vocabulary in vocabularies:
        todo = [(s, k) for s, k in itertools.product(shares, kinds) if (vocabulary, s, k) not in done]
        if not todo:
            continue
        base = Inputs.make(POSITIONS, vocabulary, options.device)
        exact = exact_values(base, kinds)
        for share, kind in todo:
            _progress(f"V={vocabulary}, {share:.0%} masked, {kind}")
            inputs = base.masked(share)
            mean = float(exact[kind][inputs.counts].mean())
            figures = time_cell(names, inputs, OBJECTIVES[kind], repeats, mean, options.device)
            for name in names:
                arguments = (name, kind, POSITIONS, vocabulary, share, options.device)
                peak = isolated.peak_memory(prepare, arguments, options.device)
                figures[name] |= {"peak_bytes": peak.growth, "peak_source": peak.source}
            place = {"vocabulary": vocabulary, "masked": share, "objective": kind, "exact_loss": mean}
            report["cells"].append({**place, "contestants": figures})
            options.json.write_text(json.dumps(report, indent=1))  # a long run that is cut short keeps its cells
    if options.scaling:
        report["scaling"] = measure_scaling(options.device)
        draw(report["scaling"], options.scaling)
    report["goals"] = judge(report["cells"], report["correctness"], options.device)
    options.json.write_text(json.dumps(report, indent=1))
    show(report["cells"], report["correctness"], names, options.device)
    if report["scaling"]:
        show_scaling(report["scaling"])
    sys.stdout.flush()
    print(last_line(report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
