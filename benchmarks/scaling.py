"""What `opd` and TRL cost per token as things grow, and two processes: `python -m benchmarks.scaling --json PATH`.

Three curves on small models with random weights: completion length (the same for all rows, and the sampled tokens of a
step nearly so), completions of one prompt, vocabulary; each with the peak memory of a fresh process. TRL runs as
shipped; a group is to it a prompt that stands in the batch several times. Then two processes of one thread each share a
step's prompts over gloo, each with a copy of the weights (DDP) or with half of them (FSDP2): their gradient on given
completions against one process's, and sampled tokens a second of wall clock, against one process with the same step and
against one with as many prompts as each of the two. Two processes need two idle cores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import statistics
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.alternation import Worker, compete, peak_memory, versions_and_machine, write
from benchmarks.contestants import OPD, TRL
from benchmarks.head_to_head import last_line, progress
from benchmarks.loss_operator import finished_cells
from benchmarks.session import Job
from benchmarks.sizes import Shape, Size, materialise

LENGTHS = (64, 256, 1024, 4096)
GROUPS = (1, 4, 16)
VOCABULARIES = (1024, 8192, 32768, 131072)
BASE = Size("scaling", 4096, Shape(128, 4, 4), Shape(256, 6, 4), batch=16, shortest=8, longest=256)
TOKENS = 4096
"""About so many sampled tokens in a step of the curve over lengths."""
STEPS_OF_TWO = 4
"""Timed steps of the processes for one of a curve's points; wall seconds are noisier."""
SPEED_GOAL, GRADIENT_GOAL, MEMORY_GOAL = 1.7, 1e-5, 1.0
ENGINES: dict[str, dict[str, str]] = {"DDP": {}, "FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
"""How two processes hold the student, and the environment that asks for it."""


def points(quick: bool) -> dict[str, list[tuple[int, Size]]]:
    """The sizes of each curve."""
    lengths, groups, vocabularies = (axis[:2] if quick else axis for axis in (LENGTHS, GROUPS, VOCABULARIES))
    base = replace(BASE, batch=4, longest=32) if quick else BASE
    tokens = 256 if quick else TOKENS
    return {
        "completion length": [(n, replace(base, batch=max(1, tokens // n), shortest=n, longest=n)) for n in lengths],
        "completions of a prompt": [
            (g, replace(base, batch=16 // g, group=g, prompt=(256, 256), shortest=64, longest=64)) for g in groups
        ],
        "vocabulary": [(v, replace(base, vocabulary=v)) for v in vocabularies],
    }


def curve(
    along: str, sizes: Sequence[tuple[int, Size]], repeats: int, names: Sequence[str], done: Collection[tuple[str, int]]
) -> Iterator[list[dict[str, Any]]]:
    """Cost per sampled token and peak memory of each contestant at each size that is not `done`."""
    for value, size in sizes:
        if (along, value) in done:
            continue
        progress(f"{along} {value}")
        materialise(size)
        jobs = {name: Job(name, size) for name in names}
        weights = (size.folder / "student" / "model.safetensors").stat().st_size
        points = []
        for name, of in compete(list(jobs.values()), repeats).items():
            by_phase = [{p: s / step["tokens"] for p, s in step["cpu"].items()} for step in of["steps"]]
            memory = peak_memory(jobs[name])
            logits = 4 * memory.pop("tokens") * size.vocabulary
            # Gradients and both moments take as much as the weights each.
            beyond = memory["peak_bytes"] - memory["loaded_bytes"] - 3 * weights
            points.append(
                {
                    "along": along,
                    "value": value,
                    "contestant": name,
                    "size": asdict(size),
                    "tokens": [step["tokens"] for step in of["steps"]],
                    "cpu_per_token": of["cpu_per_token"],
                    "cpu_per_token_each": [sum(step.values()) for step in by_phase],
                    "cpu_per_token_by_phase": {
                        phase: statistics.median(step.get(phase, 0.0) for step in by_phase)
                        for phase in sorted({phase for step in by_phase for phase in step})
                    },
                    **memory,
                    "beyond_state_over_logits": beyond / logits,
                }
            )
        yield points


class Crew:
    """Processes of one thread that share every step of `size`, each on a core of its own."""

    def __init__(self, size: Size, processes: int, environment: dict[str, str]):
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.workers: list[Worker] = []
        for rank in range(processes):
            places = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes, "ACCELERATE_USE_CPU": "true"}
            own = {**shared, **places, **environment} if processes > 1 else {}
            with mock.patch.dict(os.environ, {key: str(value) for key, value in own.items()}):
                self.workers.append(Worker(Job(OPD, size), core=rank))

    def ready(self) -> None:
        for worker in self.workers:
            worker.ask()

    def score(self) -> dict[str, float]:
        """Loss and gradient on completions that are the same for every crew of this size."""
        scores = self._all("score")
        # Every process has the whole gradient; the loss is a sum over their parts.
        return {**scores[0], "loss": sum(score["loss"] for score in scores)}

    def step(self) -> dict[str, Any]:
        """Sampled tokens a second of the slowest process (every process counts the tokens of all), and its seconds."""
        steps = self._all("step")
        slowest = max(steps, key=lambda step: sum(step["wall"].values()))
        return {"speed": steps[0]["tokens"] / sum(slowest["wall"].values()), "wall": slowest["wall"]}

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def _all(self, command: str) -> list[dict[str, Any]]:
        for worker in self.workers:
            worker.send(command)
        return [worker.receive() for worker in self.workers]


def two_processes(size: Size, engine: str, repeats: int) -> list[dict[str, Any]]:
    """Two processes against one, stepping in turns: the step of one process shared, and as many prompts for each.

    Returns, for both steps: `prompts` of the step, `speed_up` over one process with the same step and
    `speed_up_per_process` over one with the same prompts for each process (ratios of sampled tokens a wall second,
    one a repeat), errors of loss and gradient against one process with the same step, median seconds by phase.
    """
    materialise(size)
    sizes = {s.batch: s for s in (size, replace(size, batch=2 * size.batch))}
    crews: dict[tuple[int, int], Crew] = {}
    try:
        for processes in (1, 2):
            for prompts, of in sizes.items():
                crews[processes, prompts] = Crew(of, processes, ENGINES[engine])
        for crew in crews.values():
            crew.ready()
        scores = {key: crew.score() for key, crew in crews.items()}
        steps: dict[tuple[int, int], list[dict[str, Any]]] = {key: [] for key in crews}
        for repeat in range(repeats + 1):
            progress(f"two processes, {engine}: step {repeat} of {repeats}")
            for key, crew in crews.items():
                steps[key].append(crew.step())
    finally:
        for crew in crews.values():
            crew.close()

    # The first step warms up.
    speeds = {key: [step["speed"] for step in of[1:]] for key, of in steps.items()}
    seconds = {
        key: {p: statistics.median(step["wall"].get(p, 0.0) for step in of[1:]) for p in of[0]["wall"]}
        for key, of in steps.items()
    }

    def ratios(prompts: int, alone: int) -> list[float]:
        return [two / one for two, one in zip(speeds[2, prompts], speeds[1, alone], strict=True)]

    found = []
    for prompts in sizes:
        one, two = scores[1, prompts], scores[2, prompts]
        apart = max(abs(two[key] - one[key]) for key in ("gradient_norm", "gradient_component"))
        found.append(
            {
                "engine": engine,
                "prompts": prompts,
                "tokens_per_second": {"one": speeds[1, prompts], "two": speeds[2, prompts]},
                "wall_by_phase": {"one": seconds[1, prompts], "two": seconds[2, prompts]},
                "speed_up": ratios(prompts, prompts),
                "speed_up_per_process": ratios(prompts, size.batch) if prompts == 2 * size.batch else None,
                "loss_error": abs(two["loss"] / one["loss"] - 1),
                "gradient_error": apart / one["gradient_norm"],
            }
        )
    return found


def judge(points: Sequence[dict[str, Any]], processes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Goals of the curves and of the two processes."""
    speeds = [of["speed_up_per_process"] for of in processes if of["engine"] == "DDP" and of["speed_up_per_process"]]
    speed = statistics.median(speeds[0]) if speeds else None
    errors = [of[key] for of in processes for key in ("gradient_error", "loss_error")]
    error = max(errors, default=None)
    largest = [
        p["beyond_state_over_logits"]
        for p in points
        if p["contestant"] == OPD and (p["along"], p["value"]) == ("vocabulary", VOCABULARIES[-1])
    ]
    memory = max(largest, default=None)
    return [
        {
            "goal": f"V = {VOCABULARIES[-1]}: memory beyond weights, gradients and moments, over one float32 tensor "
            f"[N, V] < {MEMORY_GOAL:g}",
            "figure": memory,
            "met": None if memory is None else memory < MEMORY_GOAL,
        },
        {
            "goal": f"throughput of two processes / one, the same prompts for each process >= {SPEED_GOAL:g}",
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
    for column in ("along", "", "contestant", "all", *phases, "peak MB"):
        table.add_column(column, justify="right")
    for point in report["points"]:
        shown = [f"{1e6 * point['cpu_per_token_by_phase'].get(phase, 0):.0f}" for phase in phases]
        memory = f"{point['peak_bytes'] / 1e6:.0f}"
        place = point["along"], str(point["value"]), point["contestant"]
        table.add_row(*place, f"{1e6 * point['cpu_per_token']:.0f}", *shown, memory)
    console = Console(width=max(140, Console().width))
    console.print(table)
    for of in report["processes"]:
        speeds = [f"{statistics.median(of['speed_up']):.2f} times one with as many"]
        if of["speed_up_per_process"]:
            speeds.append(f"{statistics.median(of['speed_up_per_process']):.2f} times one with half as many")
        console.print(f"two processes, {of['engine']}, {of['prompts']} prompts: {', '.join(speeds)}")


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Cost per token above, peak memory below, one column a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {OPD: ("#2f5fa8", "o"), TRL: ("#b3443c", "s")}
    figures = (("CPU microseconds a token", "cpu_per_token", 1e6), ("peak memory, MB", "peak_bytes", 1e-6))
    axes = list(dict.fromkeys(point["along"] for point in points))
    figure, panels = pyplot.subplots(2, len(axes), figsize=(11, 6), layout="constrained", sharey="row", squeeze=False)
    for row, (label, key, unit) in zip(panels, figures, strict=True):
        row[0].set_ylabel(label)
        for panel, along in zip(row, axes, strict=True):
            here = [point for point in points if point["along"] == along]
            for name, (colour, marker) in styles.items():
                mine = [(p["value"], unit * p[key]) for p in here if p["contestant"] == name]
                if mine:
                    panel.plot(*zip(*mine, strict=True), color=colour, marker=marker, label=name)
            ticks = sorted({point["value"] for point in here})
            panel.set(xscale="log", yscale="log", xlabel=along)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xticks([], minor=True)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short points a curve, one repeat")
    parser.add_argument("--repeats", type=int, help="timed steps of each point; default 5, or 1 with --quick")
    parser.add_argument("--resume", action="store_true", help="keep the points that a run cut short left in --json")
    parser.add_argument("--no-processes", action="store_true", help="leave out the two processes")
    parser.add_argument("--no-peers", action="store_true", help="opd alone")
    parser.add_argument("--plot", type=Path, help="draw the curves to this PNG")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    if not options.no_peers and not peers.present():
        peers.reexecute("benchmarks.scaling", sys.argv[1:])
    repeats = options.repeats or (1 if options.quick else 5)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]]),
        **versions_and_machine(),
        "repeats": repeats,
        "points": [],
        "processes": [],
    }
    if options.resume:
        for part in ("points", "processes"):
            report[part] = finished_cells(options.json, report, ("versions", "repeats"), part)
    shared = replace(BASE, batch=4, longest=32) if options.quick else BASE
    done_engines = {of["engine"] for of in report["processes"]}
    for engine in () if options.no_processes else ENGINES:
        if engine not in done_engines:
            report["processes"] += two_processes(shared, engine, STEPS_OF_TWO * repeats)
            write(options.json, report)
    done = {(point["along"], point["value"]) for point in report["points"]}
    for along, sizes in points(options.quick).items():
        for found in curve(along, sizes, repeats, (OPD,) if options.no_peers else (OPD, TRL), done):
            report["points"] += found
            write(options.json, report)
    if options.plot:
        draw(report["points"], options.plot)
    report["goals"] = judge(report["points"], report["processes"])
    write(options.json, report)
    show(report)
    sys.stdout.flush()
    print(last_line("scaling", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
