"""results.json: what the arms measured, what it cost, and the verdicts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.errors import RunError, nearest
from opd.files.whole import write_whole
from opd.reproductions.catalogue import Entry
from opd.reproductions.definition import COSTS, Figures, Gate, Reproduction
from opd.reproductions.jobs import Graph, Job
from opd.reproductions.verdicts import CONVENTIONS, judge, rounded


def collect(entry: Entry, reproduction: Reproduction, graph: Graph, smoke: bool) -> dict[str, Any]:
    """The content of results.json, of jobs that are all finished. Values stand in the order of `seeds`.

    Raises:
        RunError: an arm whose figures lack a metric or a cost.
    """
    finished = {arm: [_record(job, entry.cache) for job in jobs] for arm, jobs in graph.arms.items()}
    figures = {arm: [record["figures"] for record in records] for arm, records in finished.items()}

    compared = {(arm, c.metric) for c in reproduction.claims if c.testable for arm in (c.method, c.baseline)}
    returned = {arm: {name for one in seeds for name in one} for arm, seeds in figures.items()}
    known = {name for names in returned.values() for name in names}

    def values(names: Any, needed: Any) -> dict[str, dict[str, list[float]]]:
        return {
            arm: {n: [_number(arm, one, n) for one in seeds] for n in names if needed(arm, n)}
            for arm, seeds in figures.items()
        }

    # A metric that no arm returns is a slip of the pen, which `_number` names.
    measured = values(reproduction.metrics, lambda arm, n: n in returned[arm] or (arm, n) in compared or n not in known)
    items = {
        metric: {arm: [one.get("items", {}).get(metric, {}) for one in seeds] for arm, seeds in figures.items()}
        for metric in dict.fromkeys(claim.metric for claim in reproduction.claims if claim.testable)
    }
    records = [record for seeds in finished.values() for record in seeds]
    return {
        "system": entry.name,
        "command": f"opd reproduce {entry.name}{' --smoke' if smoke else ''}",
        "profile": "smoke" if smoke else "full",
        "seeds": list(reproduction.seeds),
        "jobs": keys(graph),
        "versions": {
            package: ", ".join(sorted({record["versions"].get(package, "") for record in records} - {""}))
            for package in records[0]["versions"]
        },
        "gates": [
            {
                "stage": gate.stage,
                "figure": gate.figure,
                "limit": gate.limit,
                "values": [value for value, _ in found],
                **({"worst": [name for _, name in found]} if gate.worst else {}),
                "passed": all(gate.passes(value) for value, _ in found),
            }
            for gate in reproduction.gates
            for jobs in [graph.stages[gate.stage]]
            for found in [[_gated(gate, job, entry.cache) for job in jobs]]
        ],
        "conventions": CONVENTIONS,
        "headline_before": headline_before(None if smoke else read(entry.results), reproduction, graph),
        "claims": judged(reproduction, measured),
        "arms": measured,
        "cost": values(COSTS, lambda arm, n: True),
        "curves": {arm: [_columns(one, reproduction) for one in seeds] for arm, seeds in figures.items()},
        "items": {metric: by_arm for metric, by_arm in items.items() if any(map(any, by_arm.values()))},
    }


def keys(graph: Graph) -> dict[str, list[str]]:
    """The key of each arm's job, by seed: whether results are those of the experiment as it is stated now."""
    return {arm: [job.key for job in jobs] for arm, jobs in graph.arms.items()}


def headline_before(earlier: Mapping[str, Any] | None, reproduction: Reproduction, graph: Graph) -> list[str] | None:
    """The headline claims as they were declared when these jobs were run; None where none were declared then."""
    if earlier is not None and earlier.get("jobs") == keys(graph):
        found: list[str] | None = earlier.get("headline_before")
        return found
    return list(reproduction.headline)


def judged(reproduction: Reproduction, arms: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """Every claim with its verdict, from what results.json holds under `arms`."""
    return judge(reproduction.claims, arms, reproduction.headline)


def write(results: Mapping[str, Any], path: Path) -> None:
    """As JSON, with lists and mappings of plain values on one line each, so that a diff can be read."""
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"([\[{])\n\s*((?:[^\[\]{}\"]|\"(?:[^\"\\]|\\.)*\")*?)\n\s*([\]}])", _on_one_line, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text + "\n")


def read(path: Path) -> dict[str, Any] | None:
    """The content of a results.json, or None where there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); remove it and run the reproduction again") from None
    return found


def _on_one_line(match: re.Match[str]) -> str:
    # Texts hold no line breaks in JSON, so only those between values are replaced.
    return match[1] + re.sub(r"\n\s*", " ", match[2]) + match[3]


def _record(job: Job, cache: Path) -> dict[str, Any]:
    record = job.record(cache)
    if record is None:
        raise RunError(f"{job.name} is not finished")
    return record


def _gated(gate: Gate, job: Job, cache: Path) -> tuple[float, str]:
    value, name = gate.measured(job.name, _record(job, cache)["figures"])
    return rounded(value), name


def _number(who: str, figures: Figures, name: str) -> float:
    value = figures.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        numbers = [n for n, v in figures.items() if isinstance(v, int | float)]
        raise RunError(f"{who} has no figure {name!r}{nearest(name, numbers)}; it returned {', '.join(numbers)}")
    return rounded(value)


def on_validation(metric: str) -> str:
    """The name of a metric in a curve: training is watched on validation prompts, where `test_NAME` is `NAME`."""
    return metric.removeprefix("test_")


def _columns(figures: Figures, reproduction: Reproduction) -> dict[str, list[float]]:
    points = figures.get("curve", [])
    watched = (name for metric in reproduction.metrics for name in (metric, on_validation(metric)))
    names = [name for name in dict.fromkeys(("step", *COSTS, *watched)) if points and all(name in p for p in points)]
    return {name: [rounded(point[name]) for point in points] for name in names}
