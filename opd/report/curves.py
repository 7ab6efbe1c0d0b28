"""Logged numbers as series that a chart can draw, thinned where there are more points than pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

POINTS = 2000
"""Points that a curve keeps; more cannot be told apart on a screen."""

PHASES = "train/seconds/"


def number(value: object) -> float | None:
    """A finite number with six significant digits, or None; JSON has neither NaN nor infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def curves(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """`series` (name to `x`, `y` and the count of values that were `not_finite`) and `phases` of the step.

    `phases` holds `x` and, for each phase, as many seconds: its columns are thinned together, because a stacked chart
    adds them up.
    """
    series: dict[str, dict[str, Any]] = {}
    steps: list[int] = []
    phases: dict[str, list[float]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        timed = {name.removeprefix(PHASES): number(v) for name, v in record.items() if name.startswith(PHASES)}
        if timed:
            for phase in timed:
                phases.setdefault(phase, [0.0] * len(steps))
            steps.append(step)
            for phase, column in phases.items():
                column.append(timed.get(phase) or 0.0)
        for name, value in record.items():
            if name == "step" or name.startswith(PHASES) or not isinstance(value, int | float):
                continue
            one = series.setdefault(name, {"x": [], "y": [], "not_finite": 0})
            one["x"].append(step)
            one["y"].append(number(value))
            one["not_finite"] += not math.isfinite(value)
    for one in series.values():
        keep = extremes(one["y"])
        one["x"], one["y"] = [one["x"][i] for i in keep], [one["y"][i] for i in keep]
    width = max(math.ceil(len(steps) / POINTS), 1)
    return {
        "series": series,
        "phases": {
            "x": steps[::width],
            "seconds": {phase: _bucket_means(column, width) for phase, column in phases.items()},
        },
    }


def extremes(values: Sequence[float | None], points: int = POINTS) -> list[int]:
    """Indices to keep: everything up to `points`; beyond, the lowest and highest of each bucket, and both ends.

    A mean would hide the single step on which a run broke.
    """
    if len(values) <= points:
        return list(range(len(values)))
    keep = {0, len(values) - 1}
    width = math.ceil(2 * len(values) / points)
    for start in range(0, len(values), width):
        known = [i for i in range(start, min(start + width, len(values))) if values[i] is not None]
        if known:
            keep |= {min(known, key=lambda i: values[i] or 0.0), max(known, key=lambda i: values[i] or 0.0)}
        else:
            keep.add(start)
    return sorted(keep)


def _bucket_means(column: Sequence[float], width: int) -> list[float]:
    buckets = [column[i : i + width] for i in range(0, len(column), width)]
    return [float(f"{sum(b) / len(b):.6g}") for b in buckets]
