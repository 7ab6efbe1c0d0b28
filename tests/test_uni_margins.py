"""Uni-OPD: margins between right and wrong answers, shifted and masked, against the specification's vectors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.distributions import Sampled
from opd.objectives import Target
from opd.reduction import position_weights, sums_by_trajectory
from opd.shaping.margin import calibrated, margin_of, percentiles, returns_of
from opd.shaping.margin_mask import MarginMask
from opd.shaping.margin_shift import MarginShift
from opd.shaping.outcome_balance import OutcomeBalance
from opd.shaping.outcomes import compared
from tests.conftest import trajectories_of
from tests.uni import in_words, stepped

DELTA = 0.4
ABOVE, BELOW = [-0.5, -0.2], [-0.3, -0.1, -0.4]


def group_of(above, below, order=None):
    """float64 returns of right and wrong trajectories, and who is which, in some order."""
    returns = torch.tensor([*above, *below], dtype=torch.float64)
    right = torch.tensor([True] * len(above) + [False] * len(below))
    order = range(len(right)) if order is None else order
    return returns[list(order)], right[list(order)], ~right[list(order)]


@pytest.mark.parametrize(("statistic", "margin", "lam"), [("mean", -0.08333333, 0.48333333), ("minmax", -0.4, 0.8)])
def test_the_shifts_of_the_specification(statistic, margin, lam):
    returns, right, wrong = group_of(ABOVE, BELOW)
    assert margin_of(returns, right, wrong, statistic) == pytest.approx(margin)
    moves = {"lift": (lam, 0.0), "incorrect_down": (0.0, -lam), "spread": (lam / 2, -lam / 2)}
    for direction, (up, down) in moves.items():
        settings = MarginShift(statistic=statistic, delta=DELTA, direction=direction)
        done, found = calibrated(settings, returns, right, wrong)
        torch.testing.assert_close(done.offsets, torch.where(right, up, down).double())
        assert done.kept.all()
        assert (found["before"], found["lam"]) == (pytest.approx(margin), pytest.approx(lam))
        assert found["after"] == pytest.approx(DELTA)
        assert (found["pairs"], found["inverted_pairs"], found["inverted"]) == (6.0, 4.0, 1.0)


@pytest.mark.parametrize(
    ("statistic", "delta", "out", "margin"),
    [
        ("mean", 0.4, {-0.5, -0.1, -0.3}, 0.2),
        ("mean", 0.0, {-0.5}, 0.06666667),
        ("minmax", 0.0, {-0.5, -0.1}, 0.1),
    ],
)
def test_the_masks_of_the_specification(statistic, delta, out, margin):
    for order in (None, [3, 1, 4, 0, 2], [4, 3, 2, 1, 0]):
        returns, right, wrong = group_of(ABOVE, BELOW, order)
        done, found = calibrated(MarginMask(statistic=statistic, delta=delta), returns, right, wrong)
        assert set(returns[~done.kept].tolist()) == out
        assert found["after"] == pytest.approx(margin)
        assert not done.offsets.any()


def test_floors_of_the_mask_and_its_ties():
    # Both removals give the same margin: the right one goes.
    done, _ = calibrated(MarginMask(delta=10.0, keep=0.5), *group_of([0.0, 2.0], [1.0, 3.0]))
    assert done.kept.tolist() == [False, True, True, False]
    done, _ = calibrated(MarginMask(delta=1.5, keep=0.5), *group_of([0.0, 2.0], [0.0, 2.0]))
    assert done.kept.tolist() == [False, True, True, False]
    done, _ = calibrated(MarginMask(delta=1.0, keep=0.5), *group_of([0.0, 2.0], [0.0, 2.0]))
    assert done.kept.tolist() == [False, True, True, True]
    done, _ = calibrated(MarginMask(delta=10.0, keep=1.0), *group_of([0.0, 2.0], [1.0, 3.0]))
    assert done.kept.all()
    # Nothing helps where all are alike.
    done, _ = calibrated(MarginMask(delta=1.0), *group_of([1.0, 1.0], [1.0, 1.0]))
    assert done.kept.all()


sides = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6)
rules = st.tuples(st.sampled_from(["mean", "minmax"]), st.floats(0, 3))


@settings(max_examples=150, deadline=None)
@given(sides, sides, rules, st.sampled_from(["lift", "incorrect_down", "spread"]), st.randoms())
def test_order_agrees_with_outcome_after_a_shift(above, below, rule, direction, rng):
    statistic, delta = rule
    order = list(range(len(above) + len(below)))
    rng.shuffle(order)
    returns, right, wrong = group_of(above, below, order)
    shift = MarginShift(statistic=statistic, delta=delta, direction=direction)
    done, found = calibrated(shift, returns, right, wrong)
    moved = returns + done.offsets
    if found["before"] >= delta:
        assert not done.offsets.any()
    else:
        assert margin_of(moved, right, wrong, statistic) == pytest.approx(delta, abs=1e-9)
        assert (done.offsets[right] >= 0).all()
        assert (done.offsets[wrong] <= 0).all()
    if statistic == "minmax":
        assert moved[right].min() >= moved[wrong].max() - 1e-9
    assert moved[right].mean() >= moved[wrong].mean() - 1e-9
    # Who stands where in the group changes nothing.
    back, _ = calibrated(shift, *group_of(above, below))
    torch.testing.assert_close(done.offsets, back.offsets[order])


@settings(max_examples=150, deadline=None)
@given(sides, sides, rules, st.floats(0, 1))
def test_a_mask_only_widens_margins_and_keeps_its_floors(above, below, rule, keep):
    statistic, delta = rule
    returns, right, wrong = group_of(above, below)
    done, found = calibrated(MarginMask(statistic=statistic, delta=delta, keep=keep), returns, right, wrong)
    assert found["after"] >= found["before"]
    for side in (right, wrong):
        assert int((side & done.kept).sum()) >= max(1, int(keep * int(side.sum())))
    if found["before"] >= delta:
        assert done.kept.all()


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]])
@pytest.mark.parametrize("shaping", [MarginShift(delta=5.0), MarginMask(delta=5.0)])
def test_groups_of_one_outcome_are_left_alone(shaping, rewards):
    made, shape, shaper = stepped(shaping, [*rewards, 1.0, 0.0], [0.3, -1.0, 0.2, 0.0, 1.0], [0, 0, 0, 1, 1])
    first = int(made.lengths[:3].sum())
    assert (shape.weights[:first] == 1).all()
    assert shape.offsets is None or not shape.offsets[:first].any()
    assert shape.measured["group_margin"][:first].isnan().all()
    assert not shape.measured["group_margin"][first:].isnan().any()
    assert shaper.own_signals()["margin/mixed"] == 0.5


def test_a_shift_of_a_step_by_hand():
    right = [1.0, 1.0, 0.0, 0.0, 0.0]
    made, shape, shaper = stepped(MarginShift(), right, [*ABOVE, *BELOW])
    lam = DELTA + 0.25 / 3
    expected = torch.tensor([lam / 2] * 2 + [-lam / 2] * 3).repeat_interleave(made.lengths)
    torch.testing.assert_close(shape.offsets, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        shape.measured["return"], torch.tensor([*ABOVE, *BELOW]).repeat_interleave(made.lengths), atol=1e-5, rtol=0
    )
    found = shaper.own_signals()
    wanted = {"before": -0.25 / 3, "after": DELTA, "lam": lam, "inverted": 1.0, "inverted_pairs": 4 / 6, "mixed": 1.0}
    wanted |= {"calibrated": 1.0, "raised": 0.4, "lowered": 0.6, "masked": 0.0, "delta": DELTA}
    # One group is all of its percentiles.
    wanted |= {f"{name}_p{level}": wanted[name] for name in ("before", "after") for level in (10, 50, 90)}
    assert {name.removeprefix("margin/"): v for name, v in found.items()} == pytest.approx(wanted, abs=1e-5)
    # A trajectory without a verdict is neither, and graded verdicts are right from where the recipe says.
    _, graded, _ = stepped(MarginShift(right_from=0.5), [0.5, 0.7, 0.4, 0.0, float("nan")], [*ABOVE, *BELOW])
    lam = DELTA - (-0.35 + 0.2)
    torch.testing.assert_close(
        graded.offsets, torch.tensor([lam / 2] * 2 + [-lam / 2] * 2 + [0.0]).repeat_interleave(made.lengths)
    )


def test_percentiles_are_over_the_groups_of_all_processes(monkeypatch):
    found = {"before": [0.0, 1.0], "after": []}
    monkeypatch.setattr("opd.shaping.margin.gather_object", lambda own: [*own, {"before": [2.0], "after": [0.5]}])
    assert percentiles(found) == pytest.approx(
        {"margin/before_p10": 0.2, "margin/before_p50": 1.0, "margin/before_p90": 1.8}
        | {f"margin/after_p{level}": 0.5 for level in (10, 50, 90)}
    )
    monkeypatch.setattr("opd.shaping.margin.gather_object", list)
    assert percentiles({"before": [], "after": []}) == {}


def test_each_trajectory_is_told_what_was_done_to_it_and_why():
    rewards = [1.0, 1.0, 0.0, 0.0, float("nan"), 1.0, 0.0, 1.0]
    returns, groups = [0.5, -1.0, 0.0, -2.0, 0.0, 3.0, 0.0, 0.0], [0, 0, 0, 0, 0, 1, 1, 2]
    shift = MarginShift(delta=1.0)
    made, shape, _ = stepped(shift, rewards, returns, groups)
    told = in_words([shift], made, shape)
    assert told == [
        "right, its return is not below a wrong one's, but the margin of 0.75 is below 1: +0.12 nats a token",
        "right, but its return is below a wrong one's: +0.12 nats a token",
        "wrong, but its return is above a right one's: -0.12 nats a token",
        "wrong, its return is not above a right one's, but the margin of 0.75 is below 1: -0.12 nats a token",
        "",
        "left as it was: its margin of 3.00 is not below 1",
        "left as it was: its margin of 3.00 is not below 1",
        "",
    ]
    assert "left as it was" in in_words([shift], made, replace(shape, offsets=None))[0]
    mask, balance = MarginMask(delta=1.0), OutcomeBalance(ratio=0.5)
    made, shape, _ = stepped(mask, rewards[:5], returns[:5], groups[:5])
    assert in_words([mask], made, shape)[2] == "wrong, but its return is above a right one's: left out"
    made, shape, _ = stepped(balance, rewards[:5], returns[:5], groups[:5])
    told = in_words([balance], made, shape)
    assert sorted(told)[-1] == "dropped by chance: more right ones than the ratio of 0.5 allows"
    assert told.count("") == 4


def test_nothing_is_told_of_a_shift_where_the_answer_was_dropped():
    made, shape, _ = stepped(MarginShift(), [1.0, 0.0], [0.0, 0.0])
    dropped_too = replace(shape, measured={**shape.measured, "outcome_kept": torch.zeros(made.positions)})
    told = in_words([MarginShift(), OutcomeBalance()], made, dropped_too)
    assert all(each.startswith("dropped by chance") for each in told)


def test_a_mask_weighs_nothing_and_stays_in_the_denominator():
    made, shape, _ = stepped(MarginMask(), [1.0, 1.0, 0.0, 0.0, 0.0], [*ABOVE, *BELOW])
    kept = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    assert torch.equal(shape.weights, kept.repeat_interleave(made.lengths))
    assert shape.offsets is None
    weights = position_weights(made, "sequence_mean") * shape.weights
    torch.testing.assert_close(sums_by_trajectory(weights, made.lengths), kept / 5)


def test_margins_of_the_whole_step_and_positions_that_do_not_count():
    right = [1.0, 0.0, 1.0, 0.0]
    made, shape, shaper = stepped(MarginShift(scope="global", delta=1.0), right, [0.2, 0.0, 1.0, 1.2], [0, 0, 1, 1])
    torch.testing.assert_close(shape.offsets, torch.tensor([0.5, -0.5, 0.5, -0.5]).repeat_interleave(made.lengths))
    assert shaper.own_signals()["margin/mixed"] == 1.0
    assert shaper.own_signals()["margin/inverted_pairs"] == 0.5
    # What is not learnt from never enters a return, and a trajectory without any counts in no margin.
    made = replace(trajectories_of([2, 2]), behaviour_log_probs=torch.tensor([-1.0, -5.0, -2.0, -3.0]))
    made.learn[1] = made.learn[2] = made.learn[3] = False
    returns = returns_of(made, [Target(Sampled(torch.zeros(4)))])
    assert returns[0] == 1.0
    assert returns[1].isnan()
    # A teacher's weight is no part of what it says.
    weighed = [Target(Sampled(torch.zeros(4)), torch.tensor([3.0, 0.0, 1.0, 1.0])), Target(Sampled(torch.ones(4)), 1.0)]
    made.learn[2] = True
    torch.testing.assert_close(returns_of(made, weighed), torch.tensor([1.25, 2.5]).double())


def test_a_global_margin_counts_the_trajectories_of_all_processes(monkeypatch):
    first = {"return": torch.tensor([0.0, 0.0, 1.0]), "right": torch.tensor([True, False, True])}
    second = {"return": torch.tensor([1.0]), "right": torch.tensor([False])}
    monkeypatch.setattr("opd.shaping.outcomes.gather_object", lambda own: [first, second])
    monkeypatch.setattr("opd.shaping.outcomes.PartialState", lambda: SimpleNamespace(process_index=1))
    (found,) = compared(trajectories_of([2]), second, "global")
    assert found.numbers["return"].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert (found.mine.tolist(), found.here.tolist()) == ([3], [0])


def test_returns_that_differ_by_rounding_alone_are_not_the_wrong_way_round():
    _, shape, shaper = stepped(MarginShift(), [1.0, 0.0, 0.0], [0.0, 1e-8, -1e-8])
    found = shaper.own_signals()
    assert (found["margin/inverted"], found["margin/inverted_pairs"]) == (0.0, 0.0)
    assert not shape.measured["inverted"].any()
    _, _, shaper = stepped(MarginShift(), [1.0, 0.0, 0.0], [0.0, 1e-3, -1e-3])
    assert shaper.own_signals()["margin/inverted_pairs"] == 0.5
