"""Verdicts on numbers that a table of Student's t and a pencil give again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from opd.reproductions import Claim
from opd.reproductions.verdicts import (
    CONSTANT,
    MORE,
    NOT_TOGETHER,
    ONE_SEED,
    TIE,
    holm,
    judge,
    power,
    said,
    seeds_to_decide,
    tally,
)

CLAIM = Claim("main", "s", "m", "higher", "a", "b")
EQUIVALENT = {"test": "equivalent"}

# Quantiles of Student's t with two degrees of freedom, 97.5 and 95 %, times the standard error of [4, 5, 6].
HALF_95, HALF_90 = 4.303 / 3**0.5, 2.920 / 3**0.5


def judged(change, a, b):
    (found,) = judge([replace(CLAIM, **change)], {"a": {"m": a}, "b": {"m": b}})
    return found


@pytest.mark.parametrize(
    ("change", "a", "b", "interval", "verdict"),
    [
        # 5 plus or minus 2.484: from 2.516 to 7.484.
        ({}, [5, 6, 7], [1, 1, 1], (5, HALF_95), "reproduced"),
        ({"margin": 2.5}, [5, 6, 7], [1, 1, 1], (5, HALF_95), "reproduced"),
        ({"margin": 2.6}, [5, 6, 7], [1, 1, 1], (5, HALF_95), "undecided"),
        ({"margin": 7.4}, [5, 6, 7], [1, 1, 1], (5, HALF_95), "undecided"),
        # An effect of more than 7.5 was asked for: there is one, and it is too small.
        ({"margin": 7.5}, [5, 6, 7], [1, 1, 1], (5, HALF_95), "contradicted"),
        ({"better": "lower"}, [5, 6, 7], [1, 1, 1], (-5, HALF_95), "contradicted"),
        ({"better": "lower"}, [1, 1, 1], [5, 6, 7], (5, HALF_95), "reproduced"),
        # Not worse by more than 8, or than 7.
        ({"better": "lower", "margin": -8}, [5, 6, 7], [1, 1, 1], (-5, HALF_95), "reproduced"),
        ({"better": "lower", "margin": -7}, [5, 6, 7], [1, 1, 1], (-5, HALF_95), "undecided"),
        ({}, [2, 4, 6], [1, 2, 3], (2, HALF_95), "undecided"),
        # Paired: the spread over seeds is fifty times the difference.
        ({}, [10.5, 60.5, 110.6], [10, 60, 110], (1.6 / 3, 4.303 * 0.1 / 3), "reproduced"),
        ({}, [10.5, 60.5, 110.6], [60, 110, 10], None, "undecided"),
        # 90 %: from 3.314 to 6.686.
        ({**EQUIVALENT, "margin": 6.7}, [5, 6, 7], [1, 1, 1], (5, HALF_90), "reproduced"),
        ({**EQUIVALENT, "margin": 6.6}, [5, 6, 7], [1, 1, 1], (5, HALF_90), "undecided"),
        ({**EQUIVALENT, "margin": 3.4}, [5, 6, 7], [1, 1, 1], (5, HALF_90), "undecided"),
        ({**EQUIVALENT, "margin": 3.3}, [5, 6, 7], [1, 1, 1], (5, HALF_90), "contradicted"),
        ({**EQUIVALENT, "margin": 3.3}, [1, 1, 1], [5, 6, 7], (-5, HALF_90), "contradicted"),
        # Two seeds: 6.314 times the standard error of [-0.1, 0.1], which is 0.1.
        ({**EQUIVALENT, "margin": 0.64}, [1.1, 2.1], [1, 2.2], (0, 0.6314), "reproduced"),
        ({**EQUIVALENT, "margin": 0.62}, [1.1, 2.1], [1, 2.2], (0, 0.6314), "undecided"),
    ],
)
def test_verdicts_by_hand(change, a, b, interval, verdict):
    found = judged(change, a, b)
    assert found["verdict"] == verdict
    assert (found["seeds_to_decide"] is not None) == (verdict == "undecided")
    if interval is not None:
        middle, half = interval
        bounds = found["ci90" if found["test"] == "equivalent" else "ci95"]
        assert bounds == pytest.approx([middle - half, middle + half], rel=5e-4, abs=1e-4)
        assert found["difference"] == pytest.approx(middle, abs=1e-6)


def test_p_values_by_hand():
    # With two degrees of freedom p = 1 - t / sqrt(t^2 + 2), two-sided; of [4, 5, 6] t is (5 - margin) sqrt(3).
    def p(t):
        return 1 - abs(t) / (t**2 + 2) ** 0.5

    for margin in (0.0, 2.0, 7.5):
        assert judged({"margin": margin}, [5, 6, 7], [1, 1, 1])["p"] == pytest.approx(
            p((5 - margin) * 3**0.5), rel=1e-5
        )
    # Inside the margins the larger of two one-sided p, outside that of the near one.
    for margin, distance in ((6.0, 1.0), (3.0, 2.0)):
        found = judged({**EQUIVALENT, "margin": margin}, [5, 6, 7], [1, 1, 1])
        assert found["p"] == pytest.approx(p(distance * 3**0.5) / 2, rel=1e-5)


def test_differences_are_of_the_seeds_that_both_arms_ran():
    found = judged({}, [5, 6, 7, 100, 200], [1, 1, 1])
    assert (found["seeds"], found["difference"]) == (3, 5)
    assert found["arms"]["a"] == [5, 6, 7, 100, 200]


@pytest.mark.parametrize(
    ("change", "a", "b", "verdict", "note"),
    [
        ({}, [5], [1], "undecided", ONE_SEED),
        ({**EQUIVALENT, "margin": 9}, [5], [1], "undecided", ONE_SEED),
        # The values have bits that differ, the differences none that mean anything.
        ({}, [0.1 + 0.2, 0.6, 0.7], [0.2, 0.5, 0.6], "reproduced", CONSTANT),
        ({"better": "lower"}, [0.3, 0.6, 0.7], [0.2, 0.5, 0.6], "contradicted", CONSTANT),
        ({}, [0.3, 0.6], [0.3, 0.6], "undecided", TIE),
        ({"margin": -0.1}, [0.3, 0.6], [0.3, 0.6], "reproduced", TIE),
        ({"margin": 0.1}, [0.3, 0.6], [0.3, 0.6], "contradicted", TIE),
        ({**EQUIVALENT, "margin": 0.1}, [0.0, 0.0], [0.0, 0.0], "reproduced", TIE),
        ({**EQUIVALENT, "margin": 0.1}, [0.5, 0.5], [0.0, 0.0], "contradicted", CONSTANT),
    ],
)
def test_without_an_interval_or_its_width_the_note_says_so(change, a, b, verdict, note):
    found = judged({**change, "note": "said before"}, a, b)
    assert (found["verdict"], found["note"]) == (verdict, f"said before; {note}")
    numbers = [found["difference"], *(found["ci95"] or []), *(found["ci90"] or [])]
    assert all(np.isfinite(numbers))
    assert found["seeds_to_decide"] is None


def test_holm_by_hand():
    # Smallest first: 4 x 0.005, 3 x 0.01, 2 x 0.03, and not less than that.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_headline_claims_are_decided_together():
    # By themselves p is 0.013 and 0.035 (see above): three times the one decides, and twice the other does not.
    values = {
        "a": {"m": [5, 6, 7], "n": [4, 5, 6], "k": [1, 1, 3]},
        "b": {"m": [1, 1, 1], "n": [2, 2, 2], "k": [2, 1, 1]},
    }
    claims = [replace(CLAIM, id=name, metric=name) for name in "mnk"] + [Claim("t", "s", testable=False, note="why")]
    alone = judge(claims, values)
    assert [one["verdict"] for one in alone] == ["reproduced", "reproduced", "undecided", "not testable here"]
    assert {one["p_holm"] for one in alone} == {None}
    m, n, k, t = judge(claims, values, headline=["m", "n", "k", "t"])
    assert m["p_holm"] == pytest.approx(3 * alone[0]["p"], rel=1e-4)
    assert n["p_holm"] == pytest.approx(2 * alone[1]["p"], rel=1e-4)
    assert (m["verdict"], n["verdict"], n["note"]) == ("reproduced", "undecided", NOT_TOGETHER)
    # What would decide it among three claims is more than what would alone, and the untestable one does not count.
    assert (
        n["seeds_to_decide"]
        == seeds_to_decide(claims[1], 3.0, 1.0, 3, 0.05 / 3)
        > seeds_to_decide(claims[1], 3.0, 1.0, 3)
    )
    assert t["p_holm"] is None
    assert tally([m, n, k, t]) == {"reproduced": 1, "contradicted": 0, "undecided": 2, "not testable here": 1}
    # A claim of the appendix is neither corrected nor counted.
    m, n, *_ = judge(claims, values, headline=["m"])
    assert (m["p_holm"], n["verdict"]) == (m["p"], "reproduced")


@pytest.mark.parametrize(("mean", "seeds"), [(1.0, 10), (0.8, 15), (0.5, 34), (0.3, 90), (0.2, MORE), (0.0, MORE)])
def test_the_seeds_that_would_decide_are_those_of_the_tables(mean, seeds):
    # The paired t test's sample sizes for a power of 80 % at 5 %, two-sided, by the effect in standard deviations.
    for sign in (1, -1):
        assert seeds_to_decide(CLAIM, sign * mean, 1.0, 3) == seeds
        assert seeds_to_decide(replace(CLAIM, margin=2.0), 2.0 + sign * mean, 1.0, 3) == seeds
    if seeds == 34:
        assert seeds_to_decide(CLAIM, mean, 1.0, 40) == 41


def test_the_power_is_how_often_a_test_decides():
    generator = np.random.default_rng(0)
    for margin, mean, count in ((0.5, 0.0, 36), (0.5, 0.1, 60), (0.5, 1.0, 27)):
        claim = replace(CLAIM, **EQUIVALENT, margin=margin)
        draws = generator.normal(mean, 1.0, (4000, count))
        half = {36: 1.690, 60: 1.671, 27: 1.706}[count] * draws.std(1, ddof=1) / count**0.5
        low, high = draws.mean(1) - half, draws.mean(1) + half
        decided = (low > -margin) & (high < margin) if mean < margin else low > margin
        assert power(claim, mean, 1.0, count) == pytest.approx(decided.mean(), abs=0.03)
    assert seeds_to_decide(replace(CLAIM, **EQUIVALENT, margin=0.5), 0.5, 1.0, 3) == MORE


def test_a_verdict_in_words():
    assert said({"verdict": "undecided", "seeds_to_decide": 12}) == "undecided (12 seeds would decide)"
    assert said({"verdict": "undecided", "seeds_to_decide": MORE}) == "undecided (more than 100 seeds would decide)"
    assert said({"verdict": "reproduced", "seeds_to_decide": None}) == "reproduced"
