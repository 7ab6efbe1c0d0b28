"""Uni-OPD: bonuses, balancing by outcome and by difficulty, the gate, and several shapings in one step."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import opd
from opd.context import Context
from opd.curricula.difficulty import Difficulty, repeat_factors
from opd.distributions import Categorical, Head, Sampled
from opd.errors import RunError
from opd.objectives import Target
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.reduction import position_weights, sums_by_trajectory
from opd.shaping import Shape, Shaper, joint_shape, looked
from opd.shaping.log_ratio_gate import LogRatioGate
from opd.shaping.margin_shift import MarginShift
from opd.shaping.outcome_balance import OutcomeBalance, dropped
from opd.shaping.outcome_bonus import OutcomeBonus
from tests.conftest import trajectories_of
from tests.uni import in_words, stepped

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
