"""The results of all pairs, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.combinations.parts import KEYS, Part, Task
from benchmarks.combinations.trying import Trials
from opd.catalogue import axes
from opd.errors import RunError

FILE = Path(__file__).parent.parent / "results" / "combinations.json"
GOOD = ("works", "told", "refused")
"""Verdicts of what does as it should."""
COMMAND = "python -m benchmarks.combinations"


@dataclass(frozen=True)
class Found:
    """What came of two choices of a task together, or of one with the task's own others; `b` is empty then. Choices
    are `AXIS.NAME`."""

    a: str
    b: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """A task's results: each choice alone, and the pairs of those that are not refused alone."""

    task: str
    choices: Mapping[str, Sequence[str]]
    singles: Sequence[Found]
    pairs: Sequence[Found] = field(default_factory=list)

    @property
    def refused(self) -> dict[str, str]:
        """The choices that are refused whatever is beside them, with the reason."""
        return {found.a: found.reason for found in self.singles if found.verdict == "refused"}

    def pair(self, a: str, b: str) -> Found | None:
        return next((found for found in self.pairs if {found.a, found.b} == {a, b}), None)


def label(part: Part) -> str:
    return f"{part.axis}.{part.name}"


def measured(
    task: Task, trials: Trials, earlier: Result | None = None, told: Callable[[Result, Found], None] = lambda r, f: None
) -> Result:
    """Try everything of a task that `earlier` results do not have; `told` hears of each result as it comes, with all
    that there are by then."""
    names = {axis: [part.name for part in task.of(axis)] for axis in KEYS if task.of(axis)}
    singles: list[Found] = []
    pairs: list[Found] = []
    result = Result(task.name, names, singles, pairs)
    before = () if earlier is None else (*earlier.singles, *earlier.pairs)
    known = {(f.a, f.b): f for f in before if f.verdict in GOOD}

    def found(*parts: Part) -> Found:
        a, b = (*map(label, parts), "")[:2]
        into = pairs if b else singles
        if (a, b) in known:
            into.append(known[a, b])
            return known[a, b]
        outcome = trials.of(task, *parts)
        into.append(Found(a, b, outcome.verdict, outcome.reason))
        told(result, into[-1])
        return into[-1]

    fitting = [part for part in task.parts if found(part).verdict != "refused"]
    if lacking := without_choice(result):
        raise RunError(f"{task.name} has no choice that runs on the axes {', '.join(lacking)}: its own task is refused")
    for a, b in task.couples(fitting) if task.pairs else ():
        found(a, b)
    return result


def without_choice(result: Result) -> list[str]:
    """Axes that every recipe has and on which no choice runs: then the task is refused, and not the choice."""
    runs = {found.a.partition(".")[0] for found in result.singles if found.verdict in ("works", "told")}
    return [axis for axis in ("curriculum", "rollout", "teacher", "objective", "update") if axis not in runs]


def known_kinds() -> set[str]:
    """`AXIS.KIND` of every choice of the axes under test that comes with the package; a divergence is an objective."""
    return {
        f"{axis}.{each.kind}" for axis in KEYS for each in axes()[axis] if each.choice.__module__.startswith("opd.")
    }


def kinds_of(results: Sequence[Result]) -> set[str]:
    """Those that were tried."""
    return {f"{axis}.{name.split(' ')[0]}" for r in results for axis, names in r.choices.items() for name in names}


def save(results: Sequence[Result], facts: Mapping[str, Any], path: Path = FILE) -> None:
    """Write the results; reasons, which many pairs share, once."""
    reasons = sorted({found.reason for r in results for found in (*r.singles, *r.pairs) if found.reason})

    def line(found: Found) -> str:
        own = [found.a, found.b, found.verdict] if found.b else [found.a, found.verdict]
        return json.dumps([*own, reasons.index(found.reason)] if found.reason else own)

    blocks = []
    for result in results:
        lists = {name: ",\n   ".join(map(line, getattr(result, name))) for name in ("singles", "pairs")}
        blocks.append(
            f'  {{"task": {json.dumps(result.task)},\n   "choices": {json.dumps(result.choices)},\n'
            + ",\n".join(f'   "{name}": [\n   {lines}]' for name, lines in lists.items())
            + "}"
        )
    told = json.dumps({"command": COMMAND, **facts, "reasons": reasons}, indent=1, ensure_ascii=False)[:-2]
    text = told + ',\n "results": [\n' + ",\n".join(blocks) + "\n ]\n}\n"
    json.loads(text)
    path.write_text(text, encoding="utf-8")


def load(path: Path = FILE) -> tuple[list[Result], dict[str, Any]]:
    """The results of a file, and what else it says."""
    data = json.loads(path.read_text(encoding="utf-8"))
    reasons = data.pop("reasons")

    def found(row: Sequence[Any], names: int) -> Found:
        a, b, verdict, *rest = (*row[:names], *[""] * (2 - names), *row[names:])
        return Found(a, b, verdict, reasons[rest[0]] if rest else "")

    results = [
        Result(
            each["task"],
            each["choices"],
            [found(row, 1) for row in each["singles"]],
            [found(row, 2) for row in each["pairs"]],
        )
        for each in data.pop("results")
    ]
    return results, data
