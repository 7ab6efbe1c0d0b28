"""Verdicts from paired differences: computed from intervals, never typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd.reproductions.definition import Claim

RESAMPLES = 10_000
NOT_TESTABLE = "not testable here"

Items = Mapping[str, float]
"""One value per test item, by the item's id."""


def judge(
    claim: Claim, arms: Mapping[str, Sequence[float]], items: Mapping[str, Sequence[Items]] | None = None
) -> dict[str, Any]:
    """What results.json holds of a claim.

    Args:
        claim: what to decide.
        arms: the claim's metric for each arm, one value per seed, seeds in the same order for all. Where an arm has
            fewer, the difference is of the first seeds, which both have.
        items: the same by test item, where it is known.
    """
    stated = {
        "id": claim.id,
        "statement": claim.statement,
        "metric": claim.metric,
        "better": claim.better,
        "arms": {name: list(values) for name, values in arms.items()} if claim.testable else {},
        "method": claim.method,
        "baseline": claim.baseline,
        "test": claim.test,
        "margin": claim.margin,
    }
    if not claim.testable:
        return {
            **stated,
            "difference": None,
            "ci95": None,
            "resampled": [],
            "verdict": NOT_TESTABLE,
            "note": claim.note,
        }
    sign = 1.0 if claim.better == "higher" else -1.0
    both = range(min(len(arms[claim.method]), len(arms[claim.baseline])))
    differences = np.array([sign * (arms[claim.method][i] - arms[claim.baseline][i]) for i in both], float)
    by_item = _item_differences(claim, {arm: seeds[: len(both)] for arm, seeds in (items or {}).items()}, sign)
    interval = paired_interval(differences if by_item is None else by_item)
    verdict, note = NOT_TESTABLE, "; ".join(filter(None, [claim.note, "one seed"]))
    if interval is not None:
        low, high = interval
        held = low > claim.margin if claim.test == "better" else -claim.margin < low and high < claim.margin
        verdict, note = "reproduced" if held else "not reproduced", claim.note
    return {
        **stated,
        "difference": rounded(differences.mean()),
        "ci95": interval,
        "resampled": ["seeds"] if by_item is None else ["seeds", "items"],
        "verdict": verdict,
        "note": note,
    }


def rounded(value: float) -> float:
    """Six significant digits, which is what results.json keeps."""
    return float(f"{value:.6g}")


STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom."""


def stretch(count: int) -> float:
    """By how much a bootstrap over so few seeds, or items, is too narrow.

    A resample's spread is that of the sample, divided by n where an estimate divides by n - 1, and it knows nothing of
    how little a few values say about their spread. The factor gives the interval of Student's t for normal differences
    (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3).
    """
    t = STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else 1.96 + 2.4 / (count - 1)
    return float(t / 1.96 * (count / (count - 1)) ** 0.5)


def paired_interval(differences: np.ndarray) -> list[float] | None:
    """95 % interval of the mean of paired differences, by bootstrap with a fixed seed.

    The percentile interval of resampled seeds, stretched for their number. With items, resampled items add theirs,
    stretched for their own; all seeds get the same, since an item that is hard for one seed is hard for the others.

    Args:
        differences: `[seeds]`, or `[seeds, items]` where every seed was measured on the same items.

    Returns:
        `[low, high]`, or None with fewer than two seeds.
    """
    seeds = len(differences)
    if seeds < 2:
        return None
    generator = np.random.default_rng(0)
    by_seed = differences.reshape(seeds, -1).mean(1)
    moved = stretch(seeds) * _resampled(by_seed, generator)
    if differences.ndim == 2 and differences.shape[1] > 1:
        by_item = differences.mean(0)
        # What seeds and items make together is in the spread over seeds already: of the spread over items only the part
        # counts that is beyond it (two-way analysis of variance).
        together = differences - by_seed[:, None] - by_item + differences.mean()
        noise = (together**2).sum() / ((seeds - 1) * (len(by_item) - 1))
        spread = seeds * by_item.var(ddof=1)
        beyond = max(0.0, 1 - noise / spread) ** 0.5 if spread else 0.0
        moved = moved + beyond * stretch(len(by_item)) * _resampled(by_item, generator)
    return [rounded(bound) for bound in differences.mean() + np.percentile(moved, [2.5, 97.5])]


def _resampled(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """How far resampled means lie from the mean: `[RESAMPLES]`."""
    # How often each is drawn, over the number of draws: a resampled mean is then a weighted one.
    drawn: np.ndarray = generator.multinomial(len(values), [1 / len(values)] * len(values), RESAMPLES) / len(values)
    return drawn @ (values - values.mean())


def _item_differences(claim: Claim, items: Mapping[str, Sequence[Items]], sign: float) -> np.ndarray | None:
    """`[seeds, items]`, or None where the arms or seeds were not all measured on the same items.

    Where each seed has test items of its own, the spread over seeds holds that of the items already.
    """
    both = [one for arm in (claim.method, claim.baseline) for one in items.get(arm) or [{}]]
    if any(not one or one.keys() != both[0].keys() for one in both):
        return None
    ids = sorted(both[0])
    method, baseline = (
        np.array([[one[i] for i in ids] for one in items[arm]], float) for arm in (claim.method, claim.baseline)
    )
    return sign * (method - baseline)
