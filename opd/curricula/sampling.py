"""Which of several scored things are taken: by rank, evenly over ranks or over values, near a value, or by chance."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices from the largest score down; of equals the earlier one first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def even_places(count: int, size: int) -> list[int]:
    """`size` of the places 0 to `count - 1` at even distances, first and last among them: place
    `round((count - 1) t / (size - 1))` for t from 0, halves up; all where `size` is no less than `count`."""
    if size >= count:
        return list(range(count))
    if size < 2:
        return [0] * size
    return [math.floor((count - 1) * t / (size - 1) + 0.5) for t in range(size)]


def top(scores: Sequence[float], size: int) -> list[int]:
    """The `size` largest (Top-k)."""
    return ranked(scores)[:size]


def even_ranks(scores: Sequence[float], size: int) -> list[int]:
    """Ranks at even distances (DSUS)."""
    order = ranked(scores)
    return [order[place] for place in even_places(len(order), size)]


def buckets(scores: Sequence[float], size: int, count: int) -> list[int]:
    """Of `count` equally wide ranges of scores, the largest scores first, `size // count` each and one more from the
    first `size % count`, at even distances of rank within each (BBDS). A range with fewer gives all that it has, and
    the others no more for it."""
    order = ranked(scores)
    if not order:
        return []
    high, low = scores[order[0]], scores[order[-1]]
    width = (high - low) / count
    members: list[list[int]] = [[] for _ in range(count)]
    for i in order:
        place = int((high - scores[i]) / width) if width > 0 else 0
        members[min(place, count - 1)].append(i)
    share, more = divmod(size, count)
    return [
        found[place]
        for number, found in enumerate(members)
        for place in even_places(len(found), share + (number < more))
    ]


def gaussian(scores: Sequence[float], size: int, peak: float, width: float, rng: random.Random) -> list[int]:
    """Without replacement, each with a weight of `exp(-(score - peak)^2 / (2 width^2))` (GWDS)."""

    # The first to arrive of exponential waiting times with these rates; in logarithms, since weights may be tiny.
    def arrival(score: float) -> float:
        return math.log(-math.log1p(-rng.random()) or 5e-324) + (score - peak) ** 2 / (2 * width**2)

    times = [arrival(score) for score in scores]
    return sorted(range(len(scores)), key=times.__getitem__)[:size]
