"""How often verdicts of reproductions are wrong where the truth is known: `python -m benchmarks.interval_coverage`.

Draws differences paired by seed whose mean is known, normal ones and such as Student's t was not made for, and counts
the 95 % intervals that hold the truth, those that call the method better without an effect, and verdicts `equivalent`
at the very margin. Then pages of eight headline claims without any effect, of which none should be decided.
`--json PATH` writes the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opd.reproductions import Claim
from opd.reproductions.verdicts import LEVEL, holm, interval, p_value

DRAWS, PAGES, ITEMS, CLAIMS = 2000, 500, 200, 8
SEEDS = (3, 5, 8, 20)
GOAL_BETTER, GOAL_PAGE = 0.05, 0.07
"""On normal differences, most false verdicts `better` (nominal 0.025), and most pages with a decided claim (nominal
0.05, from which so few pages waver by a point)."""

Draw = Callable[[int, np.random.Generator], np.ndarray]


def accuracies(seeds: int, generator: np.random.Generator) -> np.ndarray:
    """Differences of two equal shares of 50 answers each, which are few values with ties."""
    return np.asarray((generator.binomial(50, 0.9, seeds) - generator.binomial(50, 0.9, seeds)) / 50)


def items(shared: bool) -> Draw:
    """Means over items whose effects differ by 0.3 around none, each answer by 0.3 more; all seeds have the same, or
    each its own."""

    def draw(seeds: int, generator: np.random.Generator) -> np.ndarray:
        of_item = 0.3 * generator.standard_normal((1 if shared else seeds, ITEMS))
        return np.asarray((of_item + 0.3 * generator.standard_normal((seeds, ITEMS))).mean(1))

    return draw


SPREADS: dict[str, Draw] = {
    "normal": lambda seeds, generator: generator.standard_normal(seeds),
    "heavy tails (t, 3 degrees)": lambda seeds, generator: generator.standard_t(3, seeds),
    "skewed (exponential)": lambda seeds, generator: generator.exponential(1.0, seeds) - 1.0,
    "shares of 50 answers": accuracies,
    f"{ITEMS} items of each seed's own": items(shared=False),
    f"{ITEMS} items, the same for all seeds": items(shared=True),
}
NORMAL = next(iter(SPREADS))


def case(spread: str, seeds: int, generator: np.random.Generator) -> dict[str, float | int | str]:
    """Shares of `DRAWS` experiments of which the true difference is 0."""
    held = better = equal = 0
    size = np.abs(SPREADS[spread](4000, generator)).mean()
    for _ in range(DRAWS):
        differences = SPREADS[spread](seeds, generator)
        if np.ptp(differences) == 0:
            held += differences[0] == 0
            better += differences[0] > 0
            continue
        low, high = interval(differences, 0.95)
        held += low <= 0 <= high
        better += low > 0
        # Moved to the margin there is no equivalence, by a hair.
        low, high = (bound + size for bound in interval(differences, 0.9))
        equal += -size < low and high < size
    shares = {"holds": held / DRAWS, "better": better / DRAWS, "equivalent": equal / DRAWS}
    return {"spread": spread, "seeds": seeds, **{name: float(share) for name, share in shares.items()}}


def page(seeds: int, generator: np.random.Generator) -> dict[str, float | int]:
    """Of `PAGES` pages with `CLAIMS` headline claims without an effect the share on which any is decided, by itself and
    after Holm's correction."""
    claim = Claim("main", "none", "m", method="a", baseline="b")
    alone = together = 0
    for _ in range(PAGES):
        values = [p_value(claim, generator.standard_normal(seeds)) for _ in range(CLAIMS)]
        alone += min(values) <= LEVEL
        together += min(holm(values)) <= LEVEL
    return {"seeds": seeds, "alone": alone / PAGES, "together": together / PAGES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the tables there too")
    arguments = parser.parse_args()
    generator = np.random.default_rng(1)
    print("| spread | seeds | holds the truth | says better falsely | says equivalent falsely |\n|---|---|---|---|---|")
    cases = []
    for spread in SPREADS:
        for seeds in SEEDS:
            found = case(spread, seeds, generator)
            cases.append(found)
            shares = " | ".join(f"{found[name]:.1%}" for name in ("holds", "better", "equivalent"))
            print(f"| {spread} | {seeds} | {shares} |", flush=True)
    print(f"\n| seeds | pages of {CLAIMS} with a claim decided by itself | after Holm |\n|---|---|---|")
    pages = [page(seeds, generator) for seeds in SEEDS]
    for one in pages:
        print(f"| {one['seeds']} | {one['alone']:.1%} | {one['together']:.1%} |")
    better = max(float(one["better"]) for one in cases if one["spread"] == NORMAL)
    together = max(float(one["together"]) for one in pages)
    met = better <= GOAL_BETTER and together <= GOAL_PAGE
    print(f"normal differences: false verdicts at most {better:.1%} (goal {GOAL_BETTER:.0%}),")
    print(f"pages at most {together:.1%} (goal {GOAL_PAGE:.0%}): {'met' if met else 'missed'}")
    if arguments.json:
        result = {"draws": DRAWS, "pages_drawn": PAGES, "claims": CLAIMS, "cases": cases, "pages": pages, "met": met}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
