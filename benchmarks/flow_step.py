"""Flow-OPD's step against a bare loop: `python -m benchmarks.flow_step [--quick] --json PATH`.

The bare loop (`Bare`) is written out over two transformers of diffusers: T steps of the SDE, the teacher and the
student on the latents of all but the last, the divergence, one backward pass, clipping, AdamW; no recipe and no logs.
Both sides have the same weights, prompts and numbers of latents, and take turns step by step in one process, which
calls the bare step between two steps of `opd`'s own loop. CPU seconds of the process, wall seconds beside them.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.alternation import silence, versions_and_machine, write
from benchmarks.head_to_head import last_line
from benchmarks.phases import over
from opd.assembly import assemble
from opd.distributions import Gaussian
from opd.drawings.vocabulary import drawing_tokenizer
from opd.flow.creation import create_flow_model
from opd.flow.encoder import PromptTable
from opd.flow.model import import_diffusers
from opd.loop import train
from opd.monitor import Monitor
from opd.policies.held_out import HeldOut
from opd.recipe import parse_recipe
from opd.run import Run
from opd.trajectories import Trajectories

GOAL = 0.9
"""Steps a second of opd over the bare loop's, at least."""
NOISE, RATE = 0.7, 1e-4


@dataclass(frozen=True)
class Size:
    """One problem: pixels, patch and layers of the transformers (width 72), trajectories and steps of the sampler."""

    name: str
    pixels: int
    patch: int
    layers: int
    batch: int
    steps: int


SIZES = (Size("16 pixels", 16, 4, 3, 64, 8), Size("32 pixels", 32, 4, 3, 32, 10))
QUICK = Size("quick", 16, 4, 1, 4, 4)


class Bare:
    """Student and teacher of two folders, and a step without a framework."""

    def __init__(self, student: Path, teacher: Path, texts: list[str], size: Size):
        diffusers = import_diffusers()
        self.size, self.texts, self.number = size, texts, 0
        kind = diffusers.SD3Transformer2DModel
        self.student, self.teacher = (kind.from_pretrained(f / "transformer") for f in (student, teacher))
        self.student.train()
        self.teacher.requires_grad_(False).eval()
        self.tables = [PromptTable.load(f / "prompt_table").requires_grad_(False) for f in (student, teacher)]
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(student / "scheduler")
        scheduler.set_timesteps(size.steps)
        self.times = scheduler.sigmas.float()
        t, following = self.times[:-1], self.times[1:]
        self.delta = t - following
        self.s = NOISE * (t / (1 - torch.where(t > 1 - 1e-6, following, t))).sqrt()
        self.generator = torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def mean(self, x: torch.Tensor, velocity: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        t, delta, drift = (v.view(-1, 1, 1, 1) for v in (self.times[k], self.delta[k], (self.s**2)[k]))
        return x * (1 - drift * delta / (2 * t)) - velocity * (1 + drift * (1 - t) / (2 * t)) * delta

    def velocity(self, model: Any, x: torch.Tensor, k: torch.Tensor, prompt: tuple[torch.Tensor, torch.Tensor]) -> Any:
        return model(x, *prompt, 1000 * self.times[k], return_dict=False)[0]

    def loss(self, states: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Sum over steps of the divergence, the mean over trajectories, at latents `[K, B, C, H, W]`."""
        count, batch = states.shape[:2]
        k = torch.arange(count).repeat_interleave(batch)
        x = states.flatten(0, 1)
        prompts = [[part.repeat(count, *[1] * (part.dim() - 1)) for part in t(t.encode(texts))] for t in self.tables]
        with torch.no_grad():
            target = self.mean(x, self.velocity(self.teacher, x, k, tuple(prompts[1])), k)
        own = self.mean(x, self.velocity(self.student, x, k, tuple(prompts[0])), k)
        kl = (own - target).square().flatten(1).mean(1) / (2 * self.s[k] ** 2 * self.delta[k])
        return kl.sum() / batch

    def step(self) -> None:
        batch, shape = self.size.batch, (self.size.batch, 3, self.size.pixels, self.size.pixels)
        first = self.number * batch % len(self.texts)
        texts = self.texts[first : first + batch]
        with torch.no_grad():
            prompt = self.tables[0](self.tables[0].encode(texts))
            self.student.eval()
            x, states = torch.randn(shape, generator=self.generator), []
            for step in range(self.size.steps):
                states.append(x)
                k = torch.full((batch,), step)
                noise = self.s[step] * self.delta[step].sqrt() * torch.randn(shape, generator=self.generator)
                x = self.mean(x, self.velocity(self.student, x, k, prompt), k) + noise
            self.student.train()
        self.loss(torch.stack(states[: int(0.99 * self.size.steps)]), texts).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1


class Turns(Monitor):
    """Logs as every run does, measures nothing held out, and lets the bare loop step after each step of `opd`."""

    def __init__(self, directory: Path, bare: Callable[[], None]):
        super().__init__(directory, quiet=True)
        self.bare = bare
        self.steps: dict[str, list[dict[str, float]]] = {"opd": [], "bare": []}

    def begin(self, run: Run) -> dict[str, float]:
        found = super().begin(run)
        self.since = _now()
        return found

    def _evaluate(self, run: Run) -> HeldOut:
        return HeldOut({}, [], {})

    def after_step(self, run: Run, signals: dict[str, float], measurement: Any) -> dict[str, float]:
        found = super().after_step(run, signals, measurement)
        self._charge("opd")
        self.bare()
        self._charge("bare")
        return found

    def _charge(self, name: str) -> None:
        now = _now()
        self.steps[name].append({clock: now[clock] - self.since[clock] for clock in now})
        self.since = now


def _now() -> dict[str, float]:
    return {"cpu": time.process_time(), "wall": time.perf_counter()}


def measure(size: Size, repeats: int, folder: Path) -> dict[str, Any]:
    """One cell: `repeats` timed steps of each side after one that warms up, and how far their losses are apart."""
    paths = [folder / size.name / name for name in ("student", "teacher")]
    for seed, path in enumerate(paths):
        shape = {"size": size.pixels, "patch": size.patch, "layers": size.layers}
        create_flow_model(path, drawing_tokenizer(), places=4, seed=seed, **shape)
    output = folder / size.name / "run"
    output.mkdir()
    task = {"kind": "count", "pixels": size.pixels}
    recipe = parse_recipe(
        {
            "steps": repeats + 1,
            "student": {"kind": "flow_transformer", "model": str(paths[0])},
            "teacher": {"kind": "flow", "model": str(paths[1]), "batch": size.batch},
            "prompts": {"kind": "drawings", "task": task, "size": 4 * size.batch},
            "rollout": {"kind": "sde", "steps": size.steps, "noise": NOISE},
            "objective": "gaussian_kl",
            "reduction": "sequence_sum",
            "update": {"learning_rate": RATE},
            "batch": {"prompts": size.batch, "micro": size.batch},
            "evaluation": {"prompts": {"kind": "drawings", "task": task, "size": 1, "split": "test"}},
            "tracking": {"trackers": []},
            "checkpoint": {"every": 0},
            "hardware": {"device": "cpu", "threads": 1},
            "self_test": False,
            "output": str(output),
        },
        "the benchmark's recipe",
    )
    holder: list[Bare] = []
    monitor = Turns(output, lambda: holder[0].step())
    run = assemble(recipe, monitor)
    texts = [str(row["prompt"]) for row in recipe.prompts[0].task.rows(4 * size.batch)]  # type: ignore[attr-defined]
    bare = Bare(paths[0], paths[1], texts, size)
    holder.append(bare)
    losses = compared(run, bare)
    train(run)
    steps = {name: each[1:] for name, each in monitor.steps.items()}
    medians = {c: {n: statistics.median(s[c] for s in each) for n, each in steps.items()} for c in ("cpu", "wall")}
    return {
        "size": asdict(size),
        "steps": steps,
        "ratio": {clock: over(of["bare"], of["opd"]) for clock, of in medians.items()},
        "loss_error": abs(losses[1] / losses[0] - 1),
    }


def compared(run: Run, bare: Bare) -> tuple[float, float]:
    """The loss of opd and of the bare loop on the same trajectories."""
    prompts = run.course.next(0, {}, None).prompts  # type: ignore[union-attr]
    now = run.at(0)
    made: Trajectories = run.rollout(now.request(prompts, stream=0, group=1))
    objective = now.recipe.objective[0]
    weights = objective.position_weights(made, run.recipe.reduction, run.sum_over_processes)
    with torch.no_grad():
        own = run.student(made)
        assert isinstance(own, Gaussian)
        ours = float(objective(own, run.ask(made, now), weights, made).total)
        starts = torch.stack([context.start for context in made.contexts])
        actions = torch.stack(made.completions())
        states = torch.cat([starts[:, None], actions[:, :-1]], 1).transpose(0, 1)
        return ours, float(bare.loss(states, [str(prompt.view()) for prompt in made.prompts]))


def judge(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals, of the worst cell."""
    ratio = min((cell["ratio"]["cpu"] for cell in cells), default=None)
    error = max((cell["loss_error"] for cell in cells), default=None)
    return [
        {
            "goal": f"Flow-OPD: steps a CPU second over those of a bare loop >= {GOAL:g}",
            "figure": ratio,
            "met": None if ratio is None else ratio >= GOAL,
        },
        {
            "goal": "Flow-OPD: losses on equal trajectories equal to 1e-05",
            "figure": error,
            "met": None if error is None else error <= 1e-5,
        },
    ]


def show(cells: list[dict[str, Any]]) -> None:
    table = Table(title="seconds a step, medians; one thread")
    for column in ("", "opd CPU", "bare CPU", "ratio", "opd wall", "bare wall", "ratio "):
        table.add_column(column, justify="right")
    for cell in cells:
        numbers = []
        for clock in ("cpu", "wall"):
            numbers += [f"{statistics.median(s[clock] for s in cell['steps'][n]):.3g}" for n in ("opd", "bare")]
            numbers.append(f"{cell['ratio'][clock]:.2f}")
        table.add_row(cell["size"]["name"], *numbers)
    Console(width=max(100, Console().width)).print(table)


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flow_step", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two steps of a tiny model")
    parser.add_argument("--repeats", type=int, help="timed steps of each side; default 7, or 2 with --quick")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.flow_step", *sys.argv[1:]]),
        **versions_and_machine(),
        "repeats": options.repeats or (2 if options.quick else 7),
        "cells": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for size in (QUICK,) if options.quick else SIZES:
            report["cells"].append(measure(size, report["repeats"], Path(folder)))
            report["goals"] = judge(report["cells"])
            write(options.json, report)
    show(report["cells"])
    sys.stdout.flush()
    print(last_line("flow_step", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
