"""Temporal grounding: intervals in answers, their overlap with the true one, rewards and recalls."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opd
from opd.context import Context
from opd.errors import DataError, RecipeError
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.verifiers.routed import RoutedVerifier
from opd.verifiers.temporal_grounding import Interval, TemporalGrounding, interval_in
from tests.conftest import character_tokenizer, tiny_model, trajectories_of


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The event happens in 2.5 - 6.0 seconds", (2.5, 6.0)),
        ("from 3 to 8 seconds, then 9 to 10", (3, 8)),
        ("3.5s-8s", (3.5, 8)),
        ("3 seconds - 8 seconds", (3, 8)),
        ("2 \u2013 4", (2, 4)),
        ("it begins at 4 and ends at 7.25.", (4, 7.25)),
        ("1:02:03 - 1:02:08.5", (3723, 3728.5)),
        ("between 0:05 and 01:10", (5, 70)),
        ("8 to 9, that is 00:08 to 00:09", (8, 9)),
        ("1 to 2, or rather 3 - 4", (3, 4)),
        ("9 - 4", (9, 4)),
        ("at 5 seconds", None),
        ("0:05", None),
        ("", None),
        ("no times here", None),
    ],
)
def test_the_first_pair_of_times_counts(text, found):
    assert interval_in(text) == found


@pytest.mark.parametrize(
    ("one", "other", "iou"),
    [
        ((0, 4), (2, 6), 2 / 6),
        ((1, 3), (1, 3), 1),
        ((0, 2), (2, 4), 0),
        ((0, 1), (3, 4), 0),
        ((0, 8), (2, 4), 0.25),
        ((4, 0), (0, 4), 0),
        ((2, 2), (0, 4), 0),
    ],
)
def test_overlap_over_union(one, other, iou):
    assert Interval(*one).iou(Interval(*other)) == pytest.approx(iou)


times = st.floats(0, 1000, allow_nan=False)


@given(times, times, times, times)
def test_an_overlap_is_a_share_and_knows_no_order(a, b, c, d):
    one, other = Interval(a, b), Interval(c, d)
    found = one.iou(other)
    assert 0 <= found <= 1
    assert found == pytest.approx(other.iou(one))


def scored(settings, answers, **fields):
    prompts = [Prompt(str(i), {"interval": [2.0, 6.0], "duration": 16.0, **fields}) for i in range(len(answers))]
    scorer = settings.build(Context(torch.device("cpu")))
    made = trajectories_of([1] * len(answers), prompts=prompts)
    return scorer, scorer.score(made, answers), scorer.measure(made, answers)


ANSWERS = ["2 - 6", "2 - 4", "6 - 2", "nothing", "0 - 2"]


def test_rewards_recalls_and_what_was_read():
    scorer, rewards, measured = scored(TemporalGrounding(), ANSWERS)
    assert rewards.tolist() == [1, 0.5, 0, 0, 0]
    assert {name: values.tolist() for name, values in measured.items()} == {
        "recall_at_0.3": [1, 1, 0, 0, 0],
        "recall_at_0.5": [1, 1, 0, 0, 0],
        "recall_at_0.7": [1, 0, 0, 0, 0],
        "parsed": [1, 1, 1, 0, 1],
    }
    assert scorer.own_signals(lambda x: x) == pytest.approx(
        {"recall_at_0.3": 0.4, "recall_at_0.5": 0.4, "recall_at_0.7": 0.2, "parsed": 0.8}
    )
    # 0.7 on paper is 0.7 in the count, though the quotient lies below it.
    _, rewards, measured = scored(TemporalGrounding(recalls=(0.7,)), ["0.1 - 0.8"], interval=[0.1, 1.1])
    assert measured["recall_at_0.7"].tolist() == [1]


def test_a_timestamp_aware_reward_is_the_overlap_less_what_both_ends_are_off():
    aware = TemporalGrounding(reward="timestamp_aware")
    _, rewards, measured = scored(aware, ["2 - 6", "2 - 4", "4 - 8", "2 - 9000"])
    assert rewards.tolist() == pytest.approx([1, 0.5 * (1 - 2 / 16), (2 / 6) * (14 / 16) ** 2, 0])
    assert measured["recall_at_0.5"].tolist() == [1, 1, 0, 0]


def test_rows_without_an_interval_have_no_verdict_and_bad_ones_are_refused():
    settings = TemporalGrounding()
    _, rewards, measured = scored(settings, ["2 - 6"], interval=None)
    assert all(math.isnan(v) for v in [*rewards.tolist(), *measured["parsed"].tolist()])
    for value in ([3, 2], [1], "1 - 2", [1, math.nan], [-1, 2], [True, 2]):
        with pytest.raises(DataError, match=r"row 3: column 'interval' holds .*an interval is \[start, end\]"):
            settings.check_prompts([Prompt("a", {"interval": value}, where="row 3")])
    with pytest.raises(DataError, match="'duration' holds None; reward timestamp_aware needs"):
        TemporalGrounding(reward="timestamp_aware").check_prompts([Prompt("a", {"interval": [1, 2]}, where="row 3")])
    own = {"kind": "temporal_grounding", "recalls": [2]}
    recipe = {"student": {"model": "m"}, "teacher": {"model": "t"}, "prompts": {"path": "p"}, "verifier": own}
    with pytest.raises(RecipeError, match=r"recalls.*above 0 and at most 1"):
        parse_recipe(recipe)


def test_a_route_measures_its_own_prompts():
    routed = RoutedVerifier(by="task", routes={"when": TemporalGrounding(recalls=(0.5,)), "what": "exact_match"})
    scorer = routed.build(Context(torch.device("cpu")))
    rows = [{"task": "when", "interval": [0, 2]}, {"task": "what", "answer": "a"}, {"task": "when", "interval": [0, 2]}]
    made = trajectories_of([1] * 3, prompts=[Prompt(str(i), row) for i, row in enumerate(rows)])
    measured = scorer.measure(made, ["0 - 2", "a", "?"])
    torch.testing.assert_close(measured["recall_at_0.5"], torch.tensor([1, math.nan, 0]), equal_nan=True)
    assert scorer.shown(made.prompts[0], {"completion": "0 - 1"}) == {"interval": {"true": [0, 2], "said": [0, 1]}}
    assert scorer.shown(made.prompts[1], {"completion": "0 - 1"}) == {}


def test_a_run_measures_recalls_and_the_teachers_own_answers(tmp_path):
    rows = [{"prompt": f"when {i}?", "interval": [0, i + 1], "duration": 9.0} for i in range(6)]
    settings = {
        "steps": 1,
        "batch": {"prompts": 2},
        "rollout": {"max_new_tokens": 4},
        "objective": "reverse_kl_sampled",
        "reduction": "sequence_sum",
        "verifier": "temporal_grounding",
        "evaluation": {"held_out": 3, "greedy": True, "teacher_answers": True},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "output": str(tmp_path),
    }
    tokenizer = character_tokenizer()
    found = opd.distill(tiny_model(seed=1), tiny_model(seed=2), rows, tokenizer=tokenizer, quiet=True, **settings)
    names = ("accuracy", "recall_at_0.3", "recall_at_0.7", "parsed")
    assert {f"{who}{name}" for who in ("", "greedy_", "teacher_") for name in names} <= found.before.keys()
    step = next(row for row in found.history if "train/loss" in row)
    assert {"train/recall_at_0.5", "train/parsed"} <= step.keys()
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert row["interval"].keys() == {"true", "said", "teacher", "duration"}
    assert isinstance(row["teacher_answer"], str)
    with pytest.raises(opd.OpdError, match="teacher_answers is true, and the recipe has no teacher"):
        opd.distill(
            tiny_model(seed=1),
            [],
            rows,
            tokenizer=tokenizer,
            quiet=True,
            overwrite=True,
            **{**settings, "objective": "grpo", "batch": {"prompts": 2, "group": 2}},
        )
