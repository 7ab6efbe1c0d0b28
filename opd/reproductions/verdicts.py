"""Verdicts from differences that are paired by seed: computed from Student's intervals, never typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from opd.reproductions.definition import Claim

REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "undecided"
NOT_TESTABLE = "not testable here"
VERDICTS = (REPRODUCED, CONTRADICTED, UNDECIDED, NOT_TESTABLE)

LEVEL = 0.05
"""Of a two-sided test of `better`, and of each of the one-sided tests of `equivalent`; of a page's headline claims
together."""
POWER, MOST_SEEDS = 0.8, 100
MORE = f"more than {MOST_SEEDS}"

ONE_SEED = "one seed: no interval"
TIE = "an exact tie in every seed: the interval has no width"
CONSTANT = "the same difference in every seed: the interval has no width, and its one value decides"
NOT_TOGETHER = "decided by itself, not among the headline claims together"

CONVENTIONS = {
    "difference": "mean over seeds of method minus baseline, paired by seed; where lower is better, baseline minus "
    "method. Positive favours the method",
    "ci95": "95 % interval of Student's t for that mean over seeds, in the metric's units; decides the test 'better'",
    "ci90": "90 % interval of the same kind; decides the test 'equivalent'",
    "p": "of the test that the verdict rests on: 'better' two-sided against the margin, 'equivalent' the one-sided "
    "tests that the difference is inside the margins, or outside where its mean is",
    "p_holm": "p after Holm's correction over the headline claims that have one; to decide a headline claim it must be "
    "at most 0.05 too",
    "seeds_to_decide": "seeds with which an undecided claim would be decided with probability 0.8, were the observed "
    "mean and spread the true ones",
}
"""What the fields of a claim in results.json mean."""


def judge(
    claims: Sequence[Claim], arms: Mapping[str, Mapping[str, Sequence[float]]], headline: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """What results.json holds of the claims.

    Args:
        claims: what to decide.
        arms: for each arm its metrics, each with one value a seed, seeds in the same order for all. Where an arm has
            fewer, the difference is of the first seeds, which both have.
        headline: ids of the claims that are held to `LEVEL` together.
    """
    found = [_stated(claim, arms, claim.id in headline) for claim in claims]
    tested = {claim.id for claim in claims if claim.id in headline and claim.testable}
    for claim, one in zip(claims, found, strict=True):
        if claim.testable:
            one |= _decided(claim, one, len(tested) if claim.id in tested else 1)
    together = [one for one in found if one["headline"] and one["p"] is not None]
    for one, adjusted in zip(together, holm([one["p"] for one in together]), strict=True):
        one["p_holm"] = rounded(adjusted)
        if one["verdict"] in (REPRODUCED, CONTRADICTED) and adjusted > LEVEL:
            one |= {"verdict": UNDECIDED, "note": _notes(one["note"], NOT_TOGETHER)}
    for one in found:
        if one["verdict"] != UNDECIDED:
            one["seeds_to_decide"] = None
    return found


def _stated(claim: Claim, arms: Mapping[str, Mapping[str, Sequence[float]]], headline: bool) -> dict[str, Any]:
    """The claim, with the verdict that it has where it is not tested."""
    return {
        "id": claim.id,
        "statement": claim.statement,
        "headline": headline,
        "metric": claim.metric,
        "better": claim.better,
        "arms": {name: list(arms[name][claim.metric]) for name in (claim.method, claim.baseline)}
        if claim.testable
        else {},
        "method": claim.method,
        "baseline": claim.baseline,
        "test": claim.test,
        "margin": claim.margin,
        "seeds": None,
        "difference": None,
        "ci95": None,
        "ci90": None,
        "p": None,
        "p_holm": None,
        "seeds_to_decide": None,
        "verdict": NOT_TESTABLE,
        "note": claim.note,
    }


def _decided(claim: Claim, stated: Mapping[str, Any], together: int) -> dict[str, Any]:
    """Interval, p and verdict of a claim by itself, and the seeds that would decide it among `together` claims."""
    method, baseline = (np.array(stated["arms"][arm], float) for arm in (claim.method, claim.baseline))
    count = min(len(method), len(baseline))
    differences = (method[:count] - baseline[:count]) * (1.0 if claim.better == "higher" else -1.0)
    found: dict[str, Any] = {"seeds": count, "difference": rounded(differences.mean())}
    if count < 2:
        return found | {"verdict": UNDECIDED, "note": _notes(claim.note, ONE_SEED)}
    # The values have six digits, so a spread far below that is of their last bits alone.
    nothing = 1e-9 * max(np.abs(method).max(), np.abs(baseline).max())
    if np.ptp(differences) <= nothing:
        mean = 0.0 if abs(found["difference"]) <= nothing else float(found["difference"])
        note = TIE if mean == 0.0 else CONSTANT
        found |= {"difference": mean, "ci95": [mean, mean], "ci90": [mean, mean], "note": _notes(claim.note, note)}
        return found | {"p": _p_without_spread(claim, mean), "verdict": _verdict(claim, mean, mean)}
    intervals = {"ci95": interval(differences, 0.95), "ci90": interval(differences, 0.9)}
    found |= {name: [rounded(bound) for bound in interval] for name, interval in intervals.items()}
    return found | {
        "p": rounded(p_value(claim, differences)),
        "verdict": _verdict(claim, *intervals["ci95" if claim.test == "better" else "ci90"]),
        "seeds_to_decide": seeds_to_decide(
            claim, float(differences.mean()), float(differences.std(ddof=1)), count, LEVEL / together
        ),
    }


def interval(differences: np.ndarray, level: float) -> tuple[float, float]:
    """Student's interval for the mean of `differences` `[seeds]`, two seeds or more."""
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(level)
    return float(low), float(high)


def _verdict(claim: Claim, low: float, high: float) -> str:
    """Of the interval that the claim's test looks at."""
    if claim.test == "better":
        return REPRODUCED if low > claim.margin else CONTRADICTED if high < claim.margin else UNDECIDED
    if -claim.margin < low and high < claim.margin:
        return REPRODUCED
    return CONTRADICTED if low > claim.margin or high < -claim.margin else UNDECIDED


def p_value(claim: Claim, differences: np.ndarray) -> float:
    """Of `better`: two-sided, that the mean is the margin. Of `equivalent`: that it is not inside the margins, the
    larger p of two one-sided tests; where the mean lies outside, that it is inside."""
    if claim.test == "better":
        return float(stats.ttest_1samp(differences, claim.margin).pvalue)

    def one_sided(margin: float, side: str) -> float:
        return float(stats.ttest_1samp(differences, margin, alternative=side).pvalue)

    if abs(differences.mean()) <= claim.margin:
        return max(one_sided(-claim.margin, "greater"), one_sided(claim.margin, "less"))
    return one_sided(claim.margin, "greater") if differences.mean() > 0 else one_sided(-claim.margin, "less")


def _p_without_spread(claim: Claim, mean: float) -> float:
    return 1.0 if _verdict(claim, mean, mean) == UNDECIDED else 0.0


def seeds_to_decide(claim: Claim, mean: float, spread: float, seeds: int, level: float = LEVEL) -> int | str:
    """The fewest seeds, more than there were, with which the claim is decided with probability `POWER`, were the
    observed mean and standard deviation over seeds the true ones; `MORE` beyond `MOST_SEEDS`.

    The power is that of the noncentral t; of two one-sided tests it is bounded from below (both but for the chance that
    either fails).
    """
    for count in range(seeds + 1, MOST_SEEDS + 1):
        if power(claim, mean, spread, count, level) >= POWER:
            return count
    return MORE


def power(claim: Claim, mean: float, spread: float, seeds: int, level: float = LEVEL) -> float:
    """How likely so many seeds decide the claim on the side on which `mean` lies."""
    degrees = seeds - 1

    def reached(distance: float, tail: float) -> float:
        """That a t statistic passes its bound, `distance` from it being the mean's."""
        found = float(stats.nct.sf(stats.t.isf(tail, degrees), degrees, distance / spread * seeds**0.5))
        return found if found == found else 1.0  # So far beyond the bound that scipy has no number.

    if claim.test == "better":
        return reached(abs(mean - claim.margin), level / 2)
    beyond = abs(mean) - claim.margin
    if beyond > 0:
        return reached(beyond, level)
    return max(0.0, reached(claim.margin - mean, level) + reached(claim.margin + mean, level) - 1.0)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p values, in their order: the k-th smallest of n times n - k + 1, not falling."""
    found, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        found[index] = largest
    return found


def said(claim: Mapping[str, Any]) -> str:
    """A verdict of results.json in words, with the seeds that would decide an undecided claim."""
    seeds = claim["seeds_to_decide"]
    return claim["verdict"] + (f" ({seeds} seeds would decide)" if seeds is not None else "")


def tally(claims: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many of the headline claims have each verdict."""
    found = [claim["verdict"] for claim in claims if claim["headline"]]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def rounded(value: float) -> float:
    """Six significant digits, which is what results.json keeps."""
    return float(f"{value:.6g}")


def _notes(*notes: str) -> str:
    return "; ".join(filter(None, notes))
