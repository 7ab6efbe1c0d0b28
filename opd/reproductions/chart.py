"""Learning curves as one small SVG: no script, readable on light and dark pages, and on paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#2f86c9", "#e0782f", "#1a9e77", "#a25fd0", "#c9507a", "#8a8a2a")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
ACROSS = {"step": "step", "cpu_seconds": "CPU seconds of training"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 300, 190, 62, 30, 64

Curves = Mapping[str, Sequence[Mapping[str, Sequence[float]]]]
"""Arm to the columns of each seed."""


def chart(curves: Curves, titles: Mapping[str, str]) -> str:
    """A row of panels for each metric of `titles` (its axis title), over steps and CPU seconds; a line a seed."""
    rows = [name for name in titles if any(name in seed for seeds in curves.values() for seed in seeds)]
    width = len(ACROSS) * (WIDTH + LEFT) + 20
    legend_rows = math.ceil(len(curves) / 3)
    top = TOP + 18 * legend_rows
    height = top + len(rows) * (HEIGHT + GAP)
    parts = [_legend(list(curves))]
    for row, metric in enumerate(rows):
        for column, across in enumerate(ACROSS):
            x, y = LEFT + column * (WIDTH + LEFT), top + row * (HEIGHT + GAP)
            panel = _panel(curves, across, metric, titles[metric] if column == 0 else "")
            parts.append(f'<g transform="translate({x} {y})">{panel}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="Learning curves"><style>text{{fill:#333}}.axis{{stroke:#999;fill:none}}'
        ".line{fill:none;stroke-width:1.6}"
        f"@media (prefers-color-scheme:dark){{text{{fill:#ccc}}.axis{{stroke:#777}}}}</style>{''.join(parts)}</svg>\n"
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _panel(curves: Curves, across: str, metric: str, title: str) -> str:
    lines = [
        (number, list(zip(seed[across], seed[metric], strict=True)))
        for number, seeds in enumerate(curves.values())
        for seed in seeds
        if metric in seed
    ]
    left, right = _range([x for _, line in lines for x, _ in line])
    bottom, top = _range([y for _, line in lines for _, y in line])

    def across_at(x: float) -> float:
        return round((x - left) / (right - left) * WIDTH, 1)

    def up_at(y: float) -> float:
        return round(HEIGHT - (y - bottom) / (top - bottom) * HEIGHT, 1)

    parts = [f'<path class="axis" d="M0 0V{HEIGHT}H{WIDTH}"/>']
    for x in ticks(left, right):
        parts.append(f'<text x="{across_at(x)}" y="{HEIGHT + 16}" text-anchor="middle">{x:g}</text>')
    for y in ticks(bottom, top):
        parts.append(f'<text x="-6" y="{up_at(y) + 4}" text-anchor="end">{y:.4g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT + 33}" text-anchor="middle">{ACROSS[across]}</text>')
    parts.append(f'<text x="0" y="-8">{escape(title)}</text>')
    for number, line in lines:
        points = " ".join(f"{across_at(x)},{up_at(y)}" for x, y in line)
        parts.append(f'<polyline class="line" {_stroke(number)} points="{points}"/>')
    return "".join(parts)


def _legend(arms: Sequence[str]) -> str:
    parts = []
    for number, arm in enumerate(arms):
        x, y = LEFT + number % 3 * 220, 12 + number // 3 * 18
        parts.append(
            f'<path class="line" {_stroke(number)} d="M{x} {y}h28"/><text x="{x + 34}" y="{y + 4}">{escape(arm)}</text>'
        )
    return "".join(parts)


def _stroke(number: int) -> str:
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{DASHES[number % len(DASHES)]}"'


def _range(values: Sequence[Any]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
