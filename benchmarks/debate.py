"""What a debate adds to a step, with and without its cache: `python -m benchmarks.debate [--quick] --json PATH`.

The same student steps on the same prompts under four teachers: one model, two of equal weight, the same two after a
debate of two rounds that is held anew, and after one that is read from the disk. Each is a run of one thread in this
process, one after the other; the first step of each is not counted.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.alternation import silence, versions_and_machine, write
from benchmarks.head_to_head import last_line, progress
from benchmarks.sizes import SIZES, Size, materialise
from benchmarks.whole import execute_whole
from opd.recipe import parse_recipe

ONE, TWO, ANEW, KEPT = "one teacher", "two teachers", "debate, held anew", "debate, kept"
ROUNDS = 2
FIGURES = {
    "cpu_seconds": "train/cpu_seconds",
    "teacher_seconds": "train/seconds/teacher",
    "step_seconds": "train/seconds/step",
    "debate_tokens": "train/debate/tokens",
    "read_tokens": "train/debate/read_tokens",
    "scored_tokens": "train/teacher_tokens",
}
"""What is kept of each step, by the name that it is logged under."""


def teachers(size: Size, text: int, cache: Path) -> dict[str, dict[str, Any]]:
    """The teacher of each arm; `text` is the most tokens of one text."""
    model = {"model": str(size.folder / "teacher"), "template": "plain", "dtype": "float32"}
    pool = {"kind": "debate", "rounds": 0, "experts": {"first": model, "second": model}}
    # Models that nobody trained to say it do not say how sure they are.
    debate = {**pool, "rounds": ROUNDS, "weighting": "uniform", "max_new_tokens": text}
    return {ONE: model, TWO: pool, ANEW: debate, KEPT: {**debate, "cache": {"path": str(cache)}}}


def recipe(size: Size, teacher: dict[str, Any], rows: int, tokens: int, steps: int, output: Path) -> dict[str, Any]:
    return {
        "steps": steps,
        "student": {"model": str(size.folder / "student"), "template": "plain", "dtype": "float32"},
        "teacher": teacher,
        "prompts": {"kind": "inline", "prompts": size.prompts(2 * steps)[: rows * steps + 1]},
        "rollout": {"max_new_tokens": tokens},
        "objective": "reverse_kl",
        "reduction": "sequence_mean",
        "batch": {"prompts": rows, "micro": rows},
        "evaluation": {"held_out": 1, "samples": 0, "max_new_tokens": 1},
        "tracking": {"trackers": []},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
        "output": str(output),
    }


def measure(size: Size, rows: int, tokens: int, text: int, repeats: int) -> dict[str, Any]:
    """Figures of every step of every arm, and their medians."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arms = teachers(size, text, folder / "debates")
        # Whoever reads debates needs some that were held.
        for i, (arm, teacher) in enumerate([("", arms[KEPT]), *arms.items()]):
            progress(f"{size.name}: {arm or 'debates that are kept'}")
            settings = recipe(size, teacher, rows, tokens, 1 + repeats, folder / f"run-{i}")
            result = execute_whole(parse_recipe(settings, "the benchmark's recipe"))
            steps = [line for line in result.history if "train/cpu_seconds" in line][1:]
            figures = [{name: step.get(key, 0.0) for name, key in FIGURES.items()} for step in steps]
            if arm:
                medians = {name: statistics.median(step[name] for step in figures) for name in FIGURES}
                found[arm] = {"steps": figures, "medians": medians}
    return found


def show(arms: dict[str, Any]) -> None:
    table = Table(title="a step, one thread, medians")
    for column in ("", *(name.replace("_", " ") for name in FIGURES)):
        table.add_column(column, justify="right")
    for arm, of in arms.items():
        table.add_row(arm, *(f"{of['medians'][name]:.3g}" for name in FIGURES))
    Console().print(table)


def judge(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """A kept debate is not held again, and every expert scores every position."""
    written = sum(step["debate_tokens"] + step["read_tokens"] for step in arms[KEPT]["steps"])
    held = min(step["debate_tokens"] for step in arms[ANEW]["steps"])
    return [
        {"goal": "debate tokens of all steps with kept debates = 0", "figure": written, "met": written == 0},
        {"goal": "debate tokens of each step with debates held anew > 0", "figure": held, "met": held > 0},
    ]


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.debate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the size tiny, texts of 16 tokens, two steps")
    parser.add_argument("--repeats", type=int, help="counted steps of each; default 5, or 2 with --quick")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    repeats = options.repeats or (2 if options.quick else 5)
    size = SIZES["tiny"] if options.quick else SIZES["smollm2"]
    rows, tokens, text = (4, 16, 16) if options.quick else (8, 128, 64)
    silence()
    torch.set_num_threads(1)
    materialise(size)
    command = shlex.join(["python", "-m", "benchmarks.debate", *sys.argv[1:]])
    arms = measure(size, rows, tokens, text, repeats)
    report = {
        "command": command,
        **versions_and_machine(),
        "size": size.name,
        "rows": rows,
        "tokens": tokens,
        "rounds": ROUNDS,
        "text": text,
        "repeats": repeats,
        "arms": arms,
        "goals": judge(arms),
    }
    write(options.json, report)
    show(arms)
    sys.stdout.flush()
    print(last_line("debate", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
