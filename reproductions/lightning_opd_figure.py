"""The gap between live distillation and Lightning against the student's drift, beside theorem 3.5's bound.

python -m reproductions.lightning_opd_figure reproductions/lightning-opd-drift/results.json PATH.svg
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.reproductions.chart import COLOURS, ticks

WIDTH, HEIGHT, LEFT, TOP, BELOW = 300, 220, 62, 56, 48
DRIFT, BEHIND, GAP, BOUND = "drift_std_in_sample", "behind_live", "gradient_gap", "gradient_bound"


@dataclass(frozen=True)
class Point:
    """One student: its `drift`, a `value`, which of the rates it was trained at, and whether it is drawn filled."""

    drift: float
    value: float
    rate: int
    filled: bool = True


def figure(arms: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str], limit: float) -> str:
    """An SVG of two panels over the drift, a point for each student.

    Args:
        arms: `arms` of results.json.
        names: arms of Lightning, by rising rate.
        limit: the drift up to which the ways are compared, drawn as a line.
    """
    left, right = [], []
    for number, name in enumerate(names):
        found = arms[name]
        left += [Point(x, 100 * y, number) for x, y in zip(found[DRIFT], found[BEHIND], strict=True)]
        for metric, filled in ((GAP, True), (BOUND, False)):
            right += [Point(x, y, number, filled) for x, y in zip(found[DRIFT], found[metric], strict=True)]
    panels = [
        panel(left, "points that Lightning is behind live", limit, _linear([p.value for p in left])),
        panel(right, "gradients: gap (full), bound of T3.5 (empty)", limit, _decades([p.value for p in right])),
    ]
    width, height = 2 * (WIDTH + LEFT) + 20, TOP + HEIGHT + BELOW
    placed = "".join(
        f'<g transform="translate({LEFT + i * (WIDTH + LEFT)} {TOP})">{one}</g>' for i, one in enumerate(panels)
    )
    legend = "".join(
        f'<circle cx="{LEFT + 170 * i}" cy="14" r="4" fill="{_colour(i)}"/>'
        f'<text x="{LEFT + 10 + 170 * i}" y="18">{name}</text>'
        for i, name in enumerate(names)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="Gap and bound against drift"><style>text{fill:#333}'
        ".axis{stroke:#999;fill:none}.limit{stroke:#999;stroke-dasharray:4 3}"
        f"@media (prefers-color-scheme:dark){{text{{fill:#ccc}}.axis{{stroke:#777}}}}</style>{legend}{placed}</svg>\n"
    )


Axis = tuple[Callable[[float], float], list[tuple[float, str]]]
"""From a value to its share of the height, and ticks: value and text."""


def _linear(values: Sequence[float]) -> Axis:
    low, high = min(*values, 0.0), max(*values, 0.0)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    return lambda value: (value - low) / (high - low), [(tick, f"{tick:g}") for tick in ticks(low, high)]


def _decades(values: Sequence[float]) -> Axis:
    """A logarithmic axis; what is not above zero lies on its lower end."""
    above = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = math.floor(min(above)), max(math.ceil(max(above)), math.floor(min(above)) + 1)

    def share(value: float) -> float:
        return (math.log10(value) - low) / (high - low) if value > 0 else 0.0

    return share, [(10.0**power, f"{10.0**power:g}") for power in range(low, high + 1)]


def panel(points: Sequence[Point], title: str, limit: float, axis: Axis) -> str:
    share, marks = axis
    furthest = max([*(point.drift for point in points), limit])

    def across(drift: float) -> float:
        return round(drift / furthest * WIDTH, 1)

    def up(value: float) -> float:
        return round(HEIGHT - share(value) * HEIGHT, 1)

    parts = [
        f'<path class="axis" d="M0 0V{HEIGHT}H{WIDTH}"/>',
        f'<path class="limit" d="M{across(limit)} 0V{HEIGHT}"/>',
        f'<text x="0" y="-8">{title}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT + 34}" text-anchor="middle">drift: spread of the ratios in sample</text>',
        *(
            f'<text x="{across(tick)}" y="{HEIGHT + 16}" text-anchor="middle">{tick:g}</text>'
            for tick in ticks(0, furthest)
        ),
        *(f'<text x="-6" y="{up(value) + 4}" text-anchor="end">{text}</text>' for value, text in marks),
    ]
    for point in points:
        colour = _colour(point.rate)
        fill = colour if point.filled else "none"
        parts.append(
            f'<circle cx="{across(point.drift)}" cy="{up(point.value)}" r="3.5" fill="{fill}" stroke="{colour}"/>'
        )
    return "".join(parts)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def main() -> None:
    from reproductions.lightning_opd_arms import LIGHTNING, at
    from reproductions.lightning_opd_premise import DRIFT as LIMIT
    from reproductions.lightning_opd_premise import RATES

    parser = argparse.ArgumentParser(description="Draw the gap against the drift from results.json.")
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, help="the SVG that is written")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.results.read_text(encoding="utf-8"))
    drawn = figure(results["arms"], [at(LIGHTNING, rate) for rate in RATES], LIMIT)
    options.picture.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
