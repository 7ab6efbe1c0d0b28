"""How often the 95 % intervals of reproductions hold the truth: `python -m benchmarks.interval_coverage`.

Draws paired differences around 0 and counts the intervals that hold 0, and those that would call the method better.
Differences are one a seed, or of 14 or 200 test items a seed, whose spread comes from the seeds, the items, both
together (the luck of each answer), or all.
"""

from __future__ import annotations

import sys

import numpy as np

from opd.reproductions.verdicts import paired_interval

DRAWS, DRAWS_WITH_ITEMS, ITEMS = 1000, 300, (14, 200)
GOAL = 0.05
"""Most false verdicts `better`; nominal 0.025."""
SPREADS = {
    "seeds": (0.05, 0.0, 0.3),
    "items": (0.0, 0.3, 0.05),
    "answers": (0.0, 0.0, 0.3),
    "all": (0.02, 0.3, 0.3),
}
"""Standard deviations of what a seed, an item and an answer add."""


def drawn(seeds: int, items: int, spread: str | None, generator: np.random.Generator) -> np.ndarray:
    """Differences around 0: `[seeds]`, or `[seeds, items]`."""
    if spread is None:
        return generator.standard_normal(seeds)
    of_seed, of_item, of_answer = SPREADS[spread]
    shapes = {(seeds, 1): of_seed, (1, items): of_item, (seeds, items): of_answer}
    parts = [size * generator.standard_normal(shape) for shape, size in shapes.items()]
    return np.asarray(sum(parts))


def main() -> int:
    generator = np.random.default_rng(1)
    worst = 0.0
    print("| seeds | items | spread | holds the truth | says better falsely |\n|---|---|---|---|---|")
    for seeds in (3, 5, 8, 20):
        for items, spread in ((0, None), *((n, s) for n in ITEMS for s in SPREADS)):
            draws = DRAWS if spread is None else DRAWS_WITH_ITEMS
            intervals = [paired_interval(drawn(seeds, items, spread, generator)) for _ in range(draws)]
            held = sum(low <= 0 <= high for low, high in intervals) / draws
            better = sum(low > 0 for low, _ in intervals) / draws
            worst = max(worst, better)
            print(f"| {seeds} | {items} | {spread or 'seeds'} | {held:.1%} | {better:.1%} |", flush=True)
    met = worst <= GOAL
    print(f"false verdicts: at most {worst:.1%} (goal {GOAL:.0%}), {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
