"""How often the 95 % intervals of reproductions hold the truth: `python -m benchmarks.interval_coverage`.

Draws paired differences from a normal distribution around 0 and counts the intervals that hold 0, and those that would
call the method better.
"""

from __future__ import annotations

import sys

import numpy as np

from opd.reproductions.verdicts import paired_interval

DRAWS = 1000
GOAL = 0.05
"""Most false verdicts `better` with five seeds or more; nominal 0.025."""


def main() -> int:
    generator = np.random.default_rng(1)
    worst = 0.0
    print("| seeds | holds the truth | says better falsely |\n|---|---|---|")
    for seeds in (3, 5, 8, 10, 20):
        intervals = [paired_interval(generator.standard_normal(seeds)) for _ in range(DRAWS)]
        held = sum(low <= 0 <= high for low, high in intervals) / DRAWS
        better = sum(low > 0 for low, _ in intervals) / DRAWS
        worst = max(worst, better) if seeds >= 5 else worst
        print(f"| {seeds} | {held:.1%} | {better:.1%} |")
    met = worst <= GOAL
    print(f"false verdicts, five seeds or more: at most {worst:.1%} (goal {GOAL:.0%}), {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
