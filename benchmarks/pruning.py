"""What pruning saves, and what refilling does: `python -m benchmarks.pruning [--quick] --json PATH`.

Steps of SmolLM2's student, half of whose layers are missing, under SmolLM2-135M, to a horizon that no row ends before:
`full` writes and learns all of it, `window` a fixed length (an effective length and the margin of a window's curriculum
behind it), `in flight` what is left where the watch `drift` ends rows; each contestant a process of one thread that
steps in turns. Then rollouts alone, of rows whose lengths differ much, with rows that join where others ended and in
whole waves, in turns in one process; both write the same tokens.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.alternation import compete, silence, versions_and_machine, write
from benchmarks.contestants import forced_sampler
from benchmarks.head_to_head import last_line, progress
from benchmarks.session import Job
from benchmarks.sizes import SIZES, ForcedLengths, Size, end_ids, materialise
from opd.context import Context
from opd.language.engines.base import Drawing, Row
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.language.tokens import Tokens

HORIZON, WINDOW, SEGMENT = 512, 200, 32
DROP = 0.01
REFILLED, WAVES = "refilled", "waves"
ROLLOUT_PROMPTS, PLACES = 48, 16
QUICK = {"batch": 4, "longest": 64}


def arms(horizon: int) -> dict[str, dict[str, Any]]:
    """What each contestant's recipe says besides; shorter horizons keep the proportions."""
    part = horizon / HORIZON
    watch = {"kind": "drift", "drop": min(1.0, DROP / part)}
    return {
        "full": {},
        "window": {"rollout": {"max_new_tokens": round(WINDOW * part)}},
        "in flight": {"rollout": {"watch": watch, "segment": max(1, round(SEGMENT * part))}},
    }


def steps(size: Size, repeats: int) -> dict[str, Any]:
    """The contestants' steps to the horizon."""
    size = replace(size, shortest=size.longest)
    jobs = [Job(name, size, changes=changes) for name, changes in arms(size.longest).items()]
    found = compete(jobs, repeats, lambda text: progress(f"{size.name}: {text}"))
    for figures in found.values():
        figures["tokens"] = statistics.median(step["tokens"] for step in figures["steps"])
    return {"size": asdict(size), "arms": arms(size.longest), "contestants": found}


def rollouts(size: Size, prompts: int, places: int, repeats: int) -> dict[str, Any]:
    """Rollouts in few places, refilled and in waves."""
    size = replace(size, batch=prompts)
    folder = size.folder / "student"
    language = LanguageModel.load(ModelSettings(model=str(folder), dtype="float32", template="plain"), "cpu").eval()
    contexts = [language.tokenizer(text, return_tensors="pt")["input_ids"][0] for text in size.prompts(1)]
    ends = end_ids(folder)
    forced = ForcedLengths.of([context.tolist() for context in contexts], size.lengths(1), ends)
    drawing = Drawing(Context(torch.device("cpu"), agreed=Tokens(end_ids=tuple(ends))), batch=places)
    taken: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in (REFILLED, WAVES)}
    written: dict[str, list[Row]] = {}
    for repeat in range(1 + repeats):
        for name, clocks in taken.items():
            progress(f"{size.name}: {name}, rollout {repeat} of {repeats}")
            sampler = forced_sampler(forced, joins=name == REFILLED)
            with mock.patch("opd.language.engines.in_process.Sampler", sampler):
                start = time.process_time(), time.perf_counter()
                written[name] = language.sample(contexts, 1, size.longest, range(prompts), drawing)
                spent = time.process_time() - start[0], time.perf_counter() - start[1]
            if repeat:  # the first one warms up
                for clock, seconds in zip(clocks.values(), spent, strict=True):
                    clock.append(seconds)
    pairs = list(zip(*written.values(), strict=True))
    medians = {name: {clock: statistics.median(s) for clock, s in clocks.items()} for name, clocks in taken.items()}
    return {
        "prompts": prompts,
        "places": places,
        "lengths": size.lengths(1),
        "seconds": taken,
        "medians": medians,
        "ratio": medians[WAVES]["cpu"] / medians[REFILLED]["cpu"],
        "same_rows": sum(torch.equal(one.actions, other.actions) for one, other in pairs) / len(pairs),
    }


def show(report: dict[str, Any]) -> None:
    """Medians of steps and rollouts."""
    if "steps" in report:
        show_steps(report["steps"])
    if "rollouts" in report:
        show_rollouts(report["rollouts"])


def show_steps(found: dict[str, Any]) -> None:
    table = Table(title=f"steps to a horizon of {found['size']['longest']}, one thread")
    for column in ("", "CPU s", "range", "wall s", "tokens", "rollout", "rest"):
        table.add_column(column, justify="right")
    for name, of in found["contestants"].items():
        low, high = of["cpu_range"]
        rollout = of["cpu_by_phase"]["rollout"]
        figures = (f"{of['wall_seconds']:.3g}", f"{of['tokens']:.0f}", f"{rollout:.3g}")
        table.add_row(
            name, f"{of['cpu_seconds']:.3g}", f"{low:.3g}-{high:.3g}", *figures, f"{of['cpu_seconds'] - rollout:.3g}"
        )
    Console().print(table)


def show_rollouts(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['prompts']} rollouts in {found['places']} places")
    for column in ("", "CPU s", "range", "wall s"):
        table.add_column(column, justify="right")
    for name, of in found["medians"].items():
        cpu = found["seconds"][name]["cpu"]
        table.add_row(name, f"{of['cpu']:.3g}", f"{min(cpu):.3g}-{max(cpu):.3g}", f"{of['wall']:.3g}")
    Console().print(table)


def judge(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Refilling has to pay, and to change no row."""
    if "rollouts" not in report:
        return []
    found = report["rollouts"]
    return [
        {"goal": "rollouts: CPU in waves / refilled >= 1", "figure": found["ratio"], "met": found["ratio"] >= 1},
        {
            "goal": "rows with the same tokens, refilled and in waves >= 0.95",
            "figure": found["same_rows"],
            "met": found["same_rows"] >= 0.95,
        },
    ]


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the size tiny, a horizon of 64, two repeats")
    parser.add_argument("--repeats", type=int, help="timed repeats of each; default 5, or 2 with --quick")
    parser.add_argument("--part", choices=("steps", "rollouts"), help="one of the two measurements alone")
    parser.add_argument("--rows", type=int, help="rows of a step; default 8, or 4 with --quick")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    repeats = options.repeats or (2 if options.quick else 5)
    size = replace(SIZES["tiny"], **QUICK) if options.quick else SIZES["smollm2"]
    size = replace(size, batch=options.rows) if options.rows else size
    silence()
    torch.set_num_threads(1)
    materialise(size)
    command = shlex.join(["python", "-m", "benchmarks.pruning", *sys.argv[1:]])
    report = {"command": command, **versions_and_machine(), "repeats": repeats}
    if options.part != "rollouts":
        report["steps"] = steps(size, repeats)
    prompts, places = (12, 4) if options.quick else (ROLLOUT_PROMPTS, PLACES)
    if options.part != "steps":
        report["rollouts"] = rollouts(size, prompts, places, repeats)
    report["goals"] = judge(report)
    write(options.json, report)
    show(report)
    sys.stdout.flush()
    print(last_line("pruning", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
