"""Lightning OPD's theory where everything can be counted: all 256 sequences of four tokens from four ids.

A model is a float64 table of logits, one row for each of the 85 prefixes; expectations are sums over all sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from opd.reproductions.definition import Figures

V, L = 4, 4
PREFIXES = [p for n in range(L) for p in itertools.product(range(V), repeat=n)]
INDEX = {prefix: i for i, prefix in enumerate(PREFIXES)}
SEQUENCES = list(itertools.product(range(V), repeat=L))
ACTIONS = torch.tensor(SEQUENCES)
STATES = torch.tensor([[INDEX[y[:t]] for t in range(L)] for y in SEQUENCES])


def table(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), V, generator=g, dtype=torch.float64)


def taken(logits: torch.Tensor) -> torch.Tensor:
    """float64 `[Y, L]` log-probability of every token of every sequence."""
    return torch.log_softmax(logits, -1)[STATES, ACTIONS]


def scores(logits: torch.Tensor) -> torch.Tensor:
    """`[Y, L, P * V]`: the gradient of every token's log-probability in the logits."""
    q = torch.softmax(logits, -1)
    found = torch.zeros(len(SEQUENCES), L, len(PREFIXES), V, dtype=torch.float64)
    y, t = torch.meshgrid(torch.arange(len(SEQUENCES)), torch.arange(L), indexing="ij")
    found[y, t, STATES] = torch.nn.functional.one_hot(ACTIONS, V).double() - q[STATES]
    return found.flatten(2)


def updates(theta: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """f: `[Y, P * V]`, the sum over a sequence of `A_t grad log q(a_t)`."""
    return ((taken(teacher) - taken(theta))[..., None] * scores(theta)).sum(1)


def law(logits: torch.Tensor) -> torch.Tensor:
    """`[Y]` probability of every sequence."""
    return taken(logits).sum(1).exp()


class Gap:
    """The online and the offline update of a student `theta` that wrote its trajectories as `ref`.

    Attributes:
        on, off: `[P * V]`, the expected updates; `off_scored` is the offline one where `scored_by` gave the targets.
        bound: T3.5's on the distance of `on` and `off`.
        covariance: what `on - off` is by T3.7.
        wrong: distance of the offline updates of the two teachers, and `wrong_bound` T3.8's bound on it.
        mixed: distance of the online and offline updates where both hear `scored_by`, and its bound.
    """

    def __init__(self, theta: torch.Tensor, ref: torch.Tensor, teacher: torch.Tensor, scored_by: torch.Tensor):
        p, w = law(ref), law(theta) / law(ref)
        f, g = updates(theta, teacher), updates(theta, scored_by)
        self.on, self.off, self.off_scored = (p * w) @ f, p @ f, p @ g
        longest = scores(theta).norm(dim=-1).max()
        advantage, delta = ((taken(teacher) - taken(other)).abs().sum(1) for other in (theta, scored_by))
        sigma_a, sigma_delta = ((p @ each**2).sqrt() for each in (advantage, delta))
        moved = (p @ w**2 - 1).clamp(min=0).sqrt()
        self.bound = longest * sigma_a * moved
        self.covariance = (p * (w - p @ w)) @ (f - p @ f)
        self.wrong, self.wrong_bound = (self.off_scored - self.off).norm(), longest * sigma_delta
        self.mixed, self.mixed_bound = ((p * w) @ g - p @ g).norm(), longest * (sigma_a + sigma_delta) * moved

    @property
    def size(self) -> torch.Tensor:
        return (self.on - self.off).norm()


def trained(ref: torch.Tensor, teacher: torch.Tensor, steps: int, rate: float) -> torch.Tensor:
    """The student after so many offline steps of gradient ascent."""
    theta, p = ref, law(ref)
    for _ in range(steps):
        theta = theta + rate * (p @ updates(theta, teacher)).view_as(ref)
    return theta


def gradient_gap(folder: Path, inputs: Mapping[str, Path], *, distances: Sequence[float], other: float) -> Figures:
    """T3.5, T3.7 and T3.8 at students that moved by `distances` in a random direction; the other teacher is `other`
    away from the right one.

    Returns:
        `t35_excess`, `t38_excess`: how far a distance exceeds its bound at most, negative where none does;
        `t37_error`: the largest entry by which the covariance misses the gap; `gap_at_start`; and `growth`, the gap
        after two offline steps of rate 1e-3 over that after one.
    """
    ref, teacher = table(0), table(1)
    wrong = teacher + other * table(5)
    gaps = [Gap(ref + distance * table(2), ref, teacher, wrong) for distance in distances]
    start, one, two = (Gap(trained(ref, teacher, steps, 1e-3), ref, teacher, wrong) for steps in (0, 1, 2))
    return {
        "t35_excess": max(float(gap.size - gap.bound) for gap in gaps),
        "t37_error": max(float((gap.on - gap.off - gap.covariance).abs().max()) for gap in gaps),
        "t38_excess": max(
            float(max(gap.wrong - gap.wrong_bound, gap.mixed - gap.mixed_bound)) for gap in [start, *gaps]
        ),
        "gap_at_start": float(start.size),
        "growth": float(two.size / one.size),
    }
