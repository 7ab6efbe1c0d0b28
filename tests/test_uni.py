"""Uni-OPD: margins, balancing by outcome and by difficulty, and the gate, against the specification's vectors."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opd
from opd.api import execute
from opd.asking import RunAsker
from opd.context import Context
from opd.curricula.difficulty import Difficulty, repeat_factors
from opd.distributions import Categorical, Head, Sampled
from opd.errors import RunError
from opd.objectives import Target
from opd.prompts import Prompt
from opd.recipe import load_recipe, parse_recipe
from opd.reduction import position_weights, sums_by_trajectory
from opd.shaping import Shape, Shaper, joint_shape, looked, words_of
from opd.shaping.log_ratio_gate import LogRatioGate
from opd.shaping.margin import calibrated, margin_of, percentiles, returns_of
from opd.shaping.margin_mask import MarginMask
from opd.shaping.margin_shift import MarginShift
from opd.shaping.outcome_balance import OutcomeBalance, dropped
from opd.shaping.outcome_bonus import OutcomeBonus
from opd.shaping.outcomes import compared
from tests.conftest import character_tokenizer, tiny_model, trajectories_of
from tests.processes import together
from tests.tiny import saved, turn_tokenizer

PLAIN = {
    "student": {"model": "org/none"},
    "teacher": {"model": "org/none"},
    "prompts": {"kind": "inline", "prompts": ["a", "b", "c"]},
}


class Fixed(Shaper):
    """Says what it was given, and counts its looks."""

    def __init__(self, shape, name):
        self.shape, self.name = shape, name

    def look(self, trajectories, targets, settings, sum_over_processes):
        trajectories.columns.setdefault("looks", []).append(self.name)
        return trajectories

    def __call__(self, student, targets, micro, settings):
        return self.shape


def test_of_several_shapings_weights_are_multiplied_and_offsets_added():
    micro = trajectories_of([2, 1])
    ones = torch.ones(3)
    first = Fixed(Shape(torch.tensor([1.0, 0.5, 2.0]), measured={"a": ones}), "first")
    second = Fixed(Shape(torch.tensor([0.0, 3.0, 1.0]), torch.tensor([0.1, 0.2, 0.3]), {"b": ones}), "second")
    third = Fixed(Shape(ones, torch.tensor([1.0, -1.0, 0.0])), "third")
    shape = joint_shape([first, second, third], [None] * 3, None, [], micro)
    assert shape.weights.tolist() == [0.0, 1.5, 2.0]
    torch.testing.assert_close(shape.offsets, torch.tensor([1.1, -0.8, 0.3]))
    assert shape.measured.keys() == {"a", "b"}
    assert joint_shape([first], [None], None, [], micro).offsets is None
    looked([first, second, third], [None] * 3, micro, [], None)
    assert micro.columns["looks"] == ["first", "second", "third"]
    with pytest.raises(RunError, match="two shapings measure 'a'"):
        joint_shape([first, first], [None] * 2, None, [], micro)


def test_a_recipe_has_one_shaping_or_a_list():
    assert parse_recipe({**PLAIN, "shaping": "uniform"}) == parse_recipe({**PLAIN, "shaping": ["uniform"]})
    both = parse_recipe({**PLAIN, "shaping": [{"kind": "drift"}, "uniform"]})
    assert [each["kind"] for each in both.dump()["shaping"]] == ["drift", "uniform"]
    with pytest.raises(opd.OpdError, match="shapings drift and drift both measure 'drifted'; list one of them"):
        parse_recipe({**PLAIN, "shaping": [{"kind": "drift"}, {"kind": "drift", "drop": 0.2}]})
    balanced = [{"kind": "drift"}, {"kind": "outcome_balance", "denominator": "kept"}]
    window = {"kind": "window", "minimum": 8, "maximum": 24}
    common = {**PLAIN, "verifier": "exact_match", "batch": {"group": 2}, "curriculum": window}
    with pytest.raises(opd.OpdError, match=r"'window' follows 'reliable' .* set its denominator to fixed"):
        parse_recipe({**common, "shaping": balanced})
    parse_recipe({**common, "shaping": [balanced[0], "outcome_balance"]})
    with pytest.raises(opd.OpdError, match=r"shaping is \[\]"):
        parse_recipe({**PLAIN, "shaping": []})


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


def stepped(shaping, rewards, returns, groups=None, **fields):
    """A shaping's look at trajectories of these rewards and returns, and its shape of them all."""
    lengths = [1 + i % 3 for i in range(len(rewards))]
    made = trajectories_of(lengths)
    groups = torch.zeros(len(rewards), dtype=torch.int64) if groups is None else torch.tensor(groups)
    made = replace(made, groups=groups, **fields).rewarded(torch.tensor(rewards), 1.0)
    noise = torch.randn(made.positions, generator=torch.Generator().manual_seed(1))
    # The mean over a trajectory's positions is what counts.
    means = torch.stack([part.mean() for part in noise.split(lengths)]).repeat_interleave(made.lengths)
    ratios = noise - means + torch.tensor(returns).repeat_interleave(made.lengths)
    made = replace(made, behaviour_log_probs=noise)
    targets = [Target(Sampled(made.behaviour_log_probs + ratios))]
    shaper = shaping.build(Context(torch.device("cpu")))
    made = shaper.look(made, targets, shaping, lambda x: x)
    return made, shaper(None, targets, made, shaping), shaper


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


def in_words(settings, made, *shapes):
    """What shapings say of each trajectory, weights and offsets among what was measured, as a run has it."""
    values = {"weight": torch.stack([shape.weights for shape in shapes]).prod(0)}
    for shape in shapes:
        values |= shape.measured | ({} if shape.offsets is None else {"offset": shape.offsets})
    return words_of(settings, made, values)


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


@pytest.mark.parametrize(
    ("form", "rewards", "expected"),
    [
        ("fixed", [1.0, 0.0, 0.0, 0.0], [0.3, -0.3, -0.3, -0.3]),
        ("fixed", [1.0, float("nan"), 0.0, 1.0], [0.3, 0.0, -0.3, 0.3]),
        # The sample's deviation is 0.5, and of two values 1 / sqrt 2.
        ("normalised", [1.0, 0.0, 0.0, 0.0], [0.45, -0.15, -0.15, -0.15]),
        ("normalised", [1.0, float("nan"), 0.0, float("nan")], [0.15 * 2**0.5, 0.0, -0.15 * 2**0.5, 0.0]),
        ("fixed", [1.0, 1.0, 1.0, float("nan")], [0.0] * 4),
        ("normalised", [0.0, 0.0, 0.0, 0.0], [0.0] * 4),
    ],
)
def test_a_bonus_goes_by_the_outcome_alone(form, rewards, expected):
    for returns in ([0.0] * 4, [3.0, -1.0, 2.0, 0.0]):
        made, shape, shaper = stepped(OutcomeBonus(form=form, amount=0.3), rewards, returns)
        torch.testing.assert_close(
            shape.offsets, torch.tensor(expected).repeat_interleave(made.lengths), atol=1e-5, rtol=0
        )
        assert (shape.weights == 1).all()
        assert shaper.own_signals() == {"bonus/mixed": float(any(expected))}
    told = in_words([OutcomeBonus(form=form, amount=0.3)], made, shape)
    sides = ["right" if reward == 1 else "wrong" for reward in rewards]
    assert told == [
        f"{side}: {bonus:+.2f} nats a token" if bonus else "" for side, bonus in zip(sides, expected, strict=True)
    ]


def test_a_bonus_over_the_whole_step_compares_all_of_it():
    rewards, returns, groups = [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [0, 0, 1, 1]
    _, shape, shaper = stepped(OutcomeBonus(scope="global", amount=1.0), rewards, returns, groups)
    assert set(shape.offsets.tolist()) == {1.0, -1.0}
    assert shaper.own_signals() == {"bonus/mixed": 1.0}
    _, shape, shaper = stepped(OutcomeBonus(amount=1.0), rewards, returns, groups)
    assert not shape.offsets.any()


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


@pytest.mark.parametrize(
    ("right", "wrong", "ratio", "out"),
    [
        (12, 4, 1.0, (8, 0)),
        (12, 4, 0.5, (10, 0)),
        (12, 4, 2.0, (4, 0)),
        (12, 4, 3.0, (0, 0)),
        (12, 4, math.inf, (0, 4)),
        (12, 4, 0.0, (12, 0)),
        (4, 12, 1.0, (0, 8)),
        (4, 12, 2.0, (0, 10)),
        (0, 16, 1.0, (0, 0)),
        (0, 16, math.inf, (0, 16)),
        (0, 16, 0.0, (0, 0)),
        (16, 0, 0.5, (0, 0)),
        (16, 0, 0.0, (16, 0)),
        (16, 0, math.inf, (0, 0)),
        (1, 15, 2.0, (0, 0)),
        (1, 15, 1.0, (0, 14)),
        (1, 15, 0.5, (0, 13)),
        (4, 12, 1.2, (0, 9)),
        (70, 100, 0.7, (0, 0)),
        (30, 100, 0.29, (1, 0)),
    ],
)
def test_the_balancers_counts(right, wrong, ratio, out):
    side = torch.tensor([True] * right + [False] * wrong)
    gone = dropped(side, torch.randperm(right + wrong), ratio)
    assert (int((gone & side).sum()), int((gone & ~side).sum())) == out


def outcome(count, right):
    return [1.0] * right + [0.0] * (count - right)


def test_the_balancer_draws_by_prompt_and_step_and_says_what_it_did():
    prompts = [Prompt(name, {"prompt": name}) for name in "ab" for _ in range(4)]
    rewards, groups = [1.0, 1.0, 1.0, 0.0] * 2, [0] * 4 + [1] * 4
    made, shape, shaper = stepped(OutcomeBalance(), rewards, [0.0] * 8, groups, prompts=prompts)
    kept = shape.weights[made.lengths.cumsum(0) - 1]
    assert kept.view(2, 4).sum(1).tolist() == [2.0, 2.0]
    assert kept[3] == kept[7] == 1
    assert shaper.own_signals() == {"balance/right": 0.75, "balance/kept": 0.5, "balance/right_kept": 0.5}
    # One prompt alone, as on a process of its own: the same are dropped.
    _, alone, _ = stepped(OutcomeBalance(), rewards[4:], [0.0] * 4, [0] * 4, prompts=prompts[4:])
    first = alone.weights[(torch.tensor([1, 2, 3, 1]).cumsum(0) - 1)]
    assert torch.equal(first, kept[4:])
    # Other steps draw anew, and a run that goes on draws as it would have.
    draws = []
    for _ in range(12):
        seen = shaper.look(made, [], OutcomeBalance(), lambda x: x)
        draws.append(tuple(seen.columns["outcome_kept"][seen.lengths.cumsum(0) - 1].tolist()))
    assert len(set(draws)) > 3
    again = OutcomeBalance().build(Context(torch.device("cpu")))
    again.load_state_dict({"steps": 5})
    seen = again.look(made, [], OutcomeBalance(), lambda x: x)
    assert tuple(seen.columns["outcome_kept"][seen.lengths.cumsum(0) - 1].tolist()) == draws[4]


def test_denominators_with_and_without_the_dropped():
    for denominator, whole in (("fixed", 4), ("kept", 2)):
        made, shape, _ = stepped(OutcomeBalance(denominator=denominator), [1.0, 1.0, 1.0, 0.0], [0.0] * 4)
        weights = sums_by_trajectory(position_weights(made, "sequence_mean") * shape.weights, made.lengths)
        assert sorted(weights.tolist()) == pytest.approx([0, 0, 1 / whole, 1 / whole])
    assert OutcomeBalance(ratio=math.inf).ratio == "inf"
    # By the whole step one of eight wrong ones stays for one right one.
    made, shape, _ = stepped(OutcomeBalance(scope="global"), [1.0, *[0.0] * 8], [0.0] * 9, [0] * 3 + [1] * 6)
    assert int(shape.weights[made.lengths.cumsum(0) - 1].sum()) == 2


def test_a_margin_behind_the_balancer_is_that_of_the_kept():
    rewards, returns = [1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 5.0, 0.5]
    for denominator in ("fixed", "kept"):
        made, _, _ = stepped(OutcomeBalance(denominator=denominator), rewards, returns)
        kept = made.columns["outcome_kept"][made.lengths.cumsum(0) - 1].bool()
        shaping = MarginShift(delta=6.0)
        targets = [Target(Sampled(made.behaviour_log_probs + torch.tensor(returns).repeat_interleave(made.lengths)))]
        seen = shaping.build(None).look(made, targets, shaping, lambda x: x)
        (margin,) = set(seen.columns["group_margin"].tolist())
        (mine,) = [r for r, stays in zip(returns[:3], kept[:3].tolist(), strict=True) if stays]
        assert margin == pytest.approx(mine - 0.5, abs=1e-5)


def test_the_gate_masks_and_does_not_clamp():
    log_q = torch.tensor([[0.5, 0.25, 0.25]] * 3).log()
    student = Categorical(log_q, Head(torch.eye(3)))
    micro = trajectories_of([3])
    micro.actions[:] = 0
    targets = [Target(Sampled(torch.log(torch.tensor([0.5, 0.05, 5e-6]))), teacher="a")]
    shape = LogRatioGate(limit=2.31).build(None)(student, targets, micro, LogRatioGate(limit=2.31))
    assert shape.weights.tolist() == [1.0, 1.0, 0.0]
    assert shape.measured["gated"].tolist() == [0.0, 0.0, 1.0]
    at_the_limit = LogRatioGate(limit=float(torch.log(torch.tensor(0.5)) - torch.log(torch.tensor(5e-6))))
    assert at_the_limit.build(None)(student, targets, micro, at_the_limit).weights.tolist() == [1.0, 1.0, 0.0]
    shift = Shape(torch.ones(3), torch.full((3,), -100.0))
    gate, moved = LogRatioGate(), Fixed(shift, "shift")
    whole = joint_shape([moved, gate.build(None)], [None, gate], student, targets, micro)
    assert whole.weights.tolist() == [1.0, 1.0, 0.0]
    assert whole.offsets.tolist() == [-100.0] * 3


def test_repeat_factors():
    # A U: both ends stand alone.
    assert repeat_factors([40, 10, 5, 4, 5, 40, 20, 10, 40], 4.0) == [1, 4, 4, 4, 4, 1, 2, 4, 1]
    # A mirrored J: falling to the easy end, which is repeated too.
    assert repeat_factors([60, 50, 40, 30, 20, 15, 12, 10, 10], 4.0) == pytest.approx([1, 1.2, 1.5, 2, 3, 4, 4, 4, 4])
    # More between than at the ends: nothing is taken out.
    assert repeat_factors([1, 50, 0, 2], 4.0) == [1, 1, 1, 1]
    assert repeat_factors([10, 100, 8, 0, 9], 1.0) == [1] * 5


class Answers:
    """Answers a course's questions: a prompt's number of right answers is its text; `-` has no verdict."""

    def __init__(self):
        self.asked, self.told = [], []

    def working(self, text):
        self.told.append(text)
        return nullcontext()

    def roll_out(self, prompts, group, budget):
        self.asked.append(len(prompts))
        self.rewards = torch.tensor(
            [
                float("nan") if p.view() == "-" else float(member < int(p.view()))
                for p in prompts
                for member in range(group)
            ]
        )
        made = trajectories_of([1] * len(self.rewards))
        return replace(made, rewards=self.rewards)

    def gather(self, trajectories, numbers):
        return numbers


def test_a_course_by_difficulty_asks_once_and_never_deletes():
    texts = ["0"] * 12 + ["1"] * 3 + ["2"] * 2 + ["3"] * 5 + ["4"] * 8 + ["-"]
    prompts = [Prompt(f"p{i}", {"prompt": text, "side": "ab"[i % 2]}) for i, text in enumerate(texts)]
    settings, context = Difficulty(responses=4), Context(torch.device("cpu"), seed=3)
    course, asker = settings.build(prompts, 1, context), Answers()
    assert course.state_dict() == {}
    draw = course.next(0, {}, asker)
    assert asker.asked == [8, 8, 15]
    assert asker.told[1] == "curriculum difficulty: 4 answers to each of the prompts 9 to 16 of 31"
    counts = [draw.signals[f"curriculum/prompts/{c}"] for c in range(5)]
    balanced = [draw.signals[f"curriculum/balanced/{c}"] for c in range(5)]
    assert counts == [12, 3, 2, 5, 8]
    assert [draw.signals[f"curriculum/repeats/{c}"] for c in range(5)] == pytest.approx([1, 4, 4, 2.4, 1])
    whole = course.inner.epochs[0].prompts
    times = Counter(p.id for p in whole)
    assert set(times) == {p.id for p in prompts}
    by_text = {text: [times[p.id] for p in prompts if p.view() == text] for text in dict.fromkeys(texts)}
    assert by_text["0"] == [1] * 12
    assert by_text["1"] == [4] * 3
    assert balanced == [sum(by_text[str(c)]) for c in range(5)]
    assert by_text["-"] == [1]
    assert set(by_text["3"]) == {2, 3}
    assert draw.signals["curriculum/prompts_balanced"] == len(whole)
    rest = [course.next(step, {}, asker) for step in range(1, 40)]
    assert len(asker.asked) == 3
    assert all("curriculum/prompts_balanced" not in each.signals for each in rest)
    # A run that goes on draws the same and asks nothing.
    again = settings.build(prompts, 1, context)
    again.load_state_dict(course.state_dict())
    assert [again.next(step, {}, None).prompts for step in range(1, 40)] == [each.prompts for each in rest]
    # Apart by a column, each with its own histogram.
    apart = Difficulty(responses=4, by="side").build(prompts, 1, context).next(0, {}, Answers())
    assert apart.signals["curriculum/prompts/a/0"] + apart.signals["curriculum/prompts/b/0"] == 12
    with pytest.raises(opd.OpdError, match=r"no column .domain., which curriculum\.by balances by"):
        Difficulty(by="domain").build(prompts, 1, context)


ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a), "side": "ab"[b % 2]} for a in range(1, 4) for b in range(1, 5)]
"""An untrained model answers with the first digit by chance, and is right sometimes."""

TOGETHER = [
    {"kind": "margin_shift", "delta": 0.5},
    {"kind": "outcome_balance"},
    {"kind": "log_ratio_gate", "limit": 3.0},
]


def trained(folder, **changes):
    """A step or more of gradient descent at rate 1, so that the weights' difference is the gradient."""
    choices = {
        "steps": 1,
        "shaping": TOGETHER,
        "objective": {"kind": "reverse_kl_sampled"},
        "reduction": "sequence_mean",
        "batch": {"prompts": 3, "group": 6, "micro": 1},
        "rollout": {"max_new_tokens": 8},
        "verifier": {"kind": "exact_match", "pattern": "([0-9])"},
        "end_tokens": [2, 5, 8, 11],
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "update": {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "clip_norm": None},
        "output": str(folder),
        **changes,
    }
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    result = opd.distill(student, teacher, ROWS, tokenizer=character_tokenizer(), quiet=True, **choices)
    gradient = {name: before[name] - p.detach() for name, p in student.named_parameters()}
    return result, gradient, before, teacher


def steps_of(result):
    return [record for record in result.history if "train/loss" in record]


@pytest.fixture
def seen(monkeypatch):
    """The trajectories of each step, as the last shaping of `TOGETHER` left them."""
    found = []

    def keep(shapers, settings, *rest):
        found.append(looked(shapers, settings, *rest))
        return found[-1]

    monkeypatch.setattr("opd.loop.looked", keep)
    return found


@pytest.mark.parametrize("objective", ["reverse_kl_sampled", "lightning"])
def test_the_gradient_of_everything_is_that_by_hand_however_groups_are_cut(objective, seen, tmp_path):
    result, cut, before, teacher = trained(tmp_path / "cut", objective={"kind": objective, "clamp": None})
    _, whole, _, _ = trained(
        tmp_path / "whole", objective={"kind": objective, "clamp": None}, batch={"prompts": 3, "group": 6}
    )
    made = seen[0]
    assert torch.equal(made.actions, seen[1].actions)
    returns, rewards = [], made.rewards.tolist()
    student = tiny_model(seed=1)
    student.load_state_dict(before, strict=False)
    ratios, own = [], []
    for context, actions in zip(made.contexts, made.completions(), strict=True):
        ids = torch.cat([context, actions])[None]
        places = torch.arange(len(context) - 1, ids.shape[1] - 1)
        log_q = student(ids).logits[0, places, :47].log_softmax(-1).gather(1, actions[:, None])[:, 0]
        with torch.no_grad():
            log_p = teacher(ids).logits[0, places, :47].log_softmax(-1).gather(1, actions[:, None])[:, 0]
        ratios.append(log_p - log_q.detach())
        own.append(log_q)
        returns.append(float(ratios[-1].mean()))
    moved = [0.0] * len(rewards)
    for first in range(0, len(rewards), 6):
        group = range(first, first + 6)
        right, wrong = [i for i in group if rewards[i] == 1], [i for i in group if rewards[i] == 0]
        if not right or not wrong:
            continue
        margin = sum(returns[i] for i in right) / len(right) - sum(returns[i] for i in wrong) / len(wrong)
        for i in group if margin < 0.5 else ():
            moved[i] = (0.5 - margin) / 2 * (1 if i in right else -1)
    assert sum(offset != 0 for offset in moved) >= 6
    firsts = made.lengths.cumsum(0) - made.lengths
    kept = made.columns["outcome_kept"][firsts].tolist()
    assert 0 < sum(kept) < len(kept)
    total, closed = torch.zeros(()), 0
    for ratio, log_q, offset, stays in zip(ratios, own, moved, kept, strict=True):
        open_ = (ratio.abs() < 3.0).float()
        closed += int((open_ == 0).sum())
        total = total - stays * ((ratio + offset) * open_ * log_q).mean() / len(rewards)
    assert closed > 0
    total.backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(cut[name], p.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(cut[name], whole[name], atol=1e-6, rtol=1e-4)
    (step,) = steps_of(result)
    assert step["train/gated"] == pytest.approx(closed / made.positions)
    assert step["train/balance/kept"] == pytest.approx(sum(kept) / len(kept))
    assert {f"train/margin/{name}" for name in ("before", "after", "lam", "inverted", "mixed", "raised")} <= step.keys()


def test_a_shift_that_is_nothing_and_a_gate_that_is_open_change_nothing(tmp_path):
    harmless = [{"kind": "margin_shift", "delta": 0.0, "statistic": "mean", "scope": "global", "right_from": 9.0}]
    _, plain, _, _ = trained(tmp_path / "plain", shaping="uniform")
    _, shaped, _, _ = trained(tmp_path / "shaped", shaping=[*harmless, {"kind": "log_ratio_gate", "limit": 1e6}])
    assert all(torch.equal(plain[name], shaped[name]) for name in plain)


def test_states_of_balancers_survive_a_checkpoint(tmp_path, monkeypatch):
    asked = []
    roll_out = RunAsker.roll_out

    def counted(self, *arguments, **named):
        asked.append(self.run.step)
        return roll_out(self, *arguments, **named)

    monkeypatch.setattr(RunAsker, "roll_out", counted)
    changes = {
        "steps": 4,
        "curriculum": {"kind": "difficulty", "responses": 3, "by": "side"},
        "batch": {"prompts": 3, "group": 4, "micro": 5},
        "checkpoint": {"every": 2},
        "update": {"learning_rate": 1e-3},
    }
    whole, _, _, _ = trained(tmp_path / "whole", **changes)
    first, _, _, _ = trained(tmp_path / "parts", **{**changes, "steps": 2})
    rest, _, _, _ = trained(tmp_path / "parts", resume="auto", **changes)
    assert asked == [0, 0]
    names = (
        "train/loss",
        "train/reward",
        "train/balance/kept",
        "train/margin/before",
        "train/curriculum/solved_before",
    )
    for name in names:
        expected = [record.get(name) for record in steps_of(whole)]
        assert [r.get(name) for r in steps_of(first)][:2] + [r.get(name) for r in steps_of(rest)][-2:] == expected
    begun = steps_of(whole)[0]
    counts = [v for k, v in begun.items() if k.startswith("train/curriculum/prompts/")]
    assert sum(counts) == len(ROWS) - 2
    assert begun["train/curriculum/prompts_balanced"] >= len(ROWS) - 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verifier": None}, r"key 'verifier' is required: shaping 'margin_shift' goes by its verdicts"),
        ({"verifier": None, "shaping": "uniform", "curriculum": "difficulty"}, r"curriculum 'difficulty' goes by"),
        ({"batch": {"prompts": 3, "group": 1}}, r"batch.group is 1: shaping 'margin_shift' compares .* change nothing"),
        ({"objective": "reverse_kl"}, r"shaping 'margin_shift' moves .* objective 'reverse_kl' has no place"),
        ({"rollout": {"max_new_tokens": 8, "top_p": 0.9}}, r"shaping 'margin_shift' needs .* without top_p"),
        ({"rollout": {"max_new_tokens": 8, "top_k": [[0, 0], [1, 5]]}, "steps": 2}, r"without top_p"),
        ({"shaping": ["margin_shift", "margin_mask"]}, r"margin_shift and margin_mask both measure 'return'"),
        ({"shaping": {"kind": "margin_mask", "teacher": "x"}}, r"shaping 'margin_mask' compares .* 'x' names none"),
        ({"shaping": {"kind": "log_ratio_gate", "teacher": "x"}}, r"shaping 'log_ratio_gate' compares .* names none"),
        (
            {"shaping": {"kind": "outcome_balance", "ratio": -1}},
            r"shaping.ratio is -1: a ratio is a number from 0, or inf$",
        ),
        (
            {"curriculum": {"kind": "difficulty", "by": "domain"}},
            r"no column 'domain', which curriculum.by balances by",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused_at_the_start(changes, words, tmp_path):
    with pytest.raises(opd.OpdError, match=words) as error:
        trained(tmp_path, **changes)
    assert len(str(error.value).splitlines()) <= 2


def test_a_whole_recipe_with_routed_teachers(tmp_path):
    student, *teachers = (
        {
            "model": str(saved(tmp_path / name, tiny_model(vocabulary=98, seed=seed), turn_tokenizer())),
            "template": "plain",
        }
        for name, seed in (("student", 1), ("math", 2), ("code", 3))
    )
    recipe = {
        "output": str(tmp_path / "run"),
        "steps": 3,
        "student": student,
        "teacher": {"kind": "routed", "by": "side", "routes": dict(zip("ab", teachers, strict=True))},
        "prompts": {"kind": "inline", "prompts": ROWS},
        "curriculum": {"kind": "difficulty", "responses": 4, "by": "side"},
        "rollout": {"max_new_tokens": 8},
        "verifier": {"kind": "exact_match", "pattern": "([0-9])"},
        "shaping": TOGETHER,
        "objective": {"kind": "lightning", "clamp": None},
        "reduction": "sequence_mean",
        "batch": {"prompts": 3, "group": 4, "micro": 5},
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "end_tokens": [1, 89],
    }
    result = execute(parse_recipe(recipe), quiet=True)
    steps = steps_of(result)
    assert len(steps) == 3
    assert all("train/margin/mixed" in step and math.isfinite(step["train/loss"]) for step in steps)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {"offset", "return", "group_margin", "group_margin_after", "outcome_kept", "gated"} <= rows[0][
        "values"
    ].keys()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["group", "global"])
def test_two_processes_find_what_one_finds(scope, tmp_path):
    """Margins, draws and difficulty do not depend on how many processes share a step."""
    model = saved(tmp_path / "student", tiny_model(vocabulary=98, seed=1), turn_tokenizer())
    teacher = saved(tmp_path / "teacher", tiny_model(vocabulary=98, seed=2), turn_tokenizer())
    recipe = {
        "steps": 2,
        "student": {"model": model, "template": "plain"},
        "teacher": {"model": teacher, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": ROWS},
        "curriculum": {"kind": "difficulty", "responses": 3},
        "rollout": {"max_new_tokens": 6},
        "verifier": {"kind": "exact_match", "pattern": "([0-9])"},
        "shaping": [
            {"kind": "margin_shift", "statistic": "minmax", "scope": scope},
            {"kind": "outcome_balance", "scope": scope, "denominator": "kept"},
        ],
        "objective": "reverse_kl_sampled",
        "reduction": "sequence_mean",
        "batch": {"prompts": 4, "group": 6, "micro": 5},
        "evaluation": {"held_out": 2, "samples": 0},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "end_tokens": [1, *range(8, 90, 6)],
    }
    found = []
    for processes in (1, 2):
        folder = tmp_path / f"of{processes}"
        (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "output": str(folder)}))
        made = load_recipe(str(tmp_path / "recipe.yaml"))
        if processes == 1:
            execute(made, quiet=True)
        else:
            assert all(isinstance(answer, dict) for answer in together(made, {}))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([record for record in lines if "train/loss" in record])
    assert any(step["train/margin/mixed"] > 0 for step in found[0])
    ours = ("train/loss", "train/reward", "train/gradient_norm", "train/margin/", "train/balance/", "train/curriculum/")
    for one, two in zip(*found, strict=True):
        one, two = ({n: v for n, v in step.items() if n.startswith(ours)} for step in (one, two))
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_returns_that_differ_by_rounding_alone_are_not_the_wrong_way_round():
    _, shape, shaper = stepped(MarginShift(), [1.0, 0.0, 0.0], [0.0, 1e-8, -1e-8])
    found = shaper.own_signals()
    assert (found["margin/inverted"], found["margin/inverted_pairs"]) == (0.0, 0.0)
    assert not shape.measured["inverted"].any()
    _, _, shaper = stepped(MarginShift(), [1.0, 0.0, 0.0], [0.0, 1e-3, -1e-3])
    assert shaper.own_signals()["margin/inverted_pairs"] == 0.5


def test_nothing_is_told_of_a_shift_where_the_answer_was_dropped():
    made, shape, _ = stepped(MarginShift(), [1.0, 0.0], [0.0, 0.0])
    dropped_too = replace(shape, measured={**shape.measured, "outcome_kept": torch.zeros(made.positions)})
    told = in_words([MarginShift(), OutcomeBalance()], made, dropped_too)
    assert all(each.startswith("dropped by chance") for each in told)


@pytest.mark.parametrize("form", ["fixed", "normalised"])
def test_a_bonus_behind_the_balancer_compares_those_kept(form):
    rewards = [1.0, 1.0, 1.0, 0.0]
    made, _, _ = stepped(OutcomeBalance(), rewards, [0.0] * 4, prompts=[Prompt("a", {"prompt": "a"})] * 4)
    bonus = OutcomeBonus(form=form, amount=1.0)
    shaper = bonus.build(Context(torch.device("cpu")))
    made = shaper.look(made, [], bonus, lambda x: x)
    first = made.lengths.cumsum(0) - 1
    kept, added = made.columns["outcome_kept"][first], made.columns["bonus"][first]
    assert int(kept.sum()) == 2
    assert not added[kept == 0].any()
    size = 1.0 if form == "fixed" else 0.5**0.5
    torch.testing.assert_close(added[kept != 0].sort().values, torch.tensor([-size, size]), atol=1e-5, rtol=0)
