"""Focusing: who is taken by each sampler, what is reliable, rounds with kept scores, and going on amid a pass."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import pytest
import torch

import opd
from opd.asking import RunAsker
from opd.context import Context
from opd.curricula import sampling
from opd.curricula.focusing import Focusing
from opd.distributions import Sampled
from opd.errors import RunError
from opd.objectives import Target
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.rollouts.teacher import TeacherRollout
from tests.conftest import character_tokenizer, tiny_model, trajectories_of

# Samplers.

SCORES = [0.1, 0.9, 0.5, 0.5, 0.3, 0.7, -0.1, 0.8, 0.2, 0.0]
ORDER = [1, 7, 5, 2, 3, 4, 8, 0, 9, 6]


def test_the_largest_come_first_and_of_equals_the_earlier():
    assert sampling.ranked(SCORES) == ORDER
    assert sampling.top(SCORES, 4) == [1, 7, 5, 2]
    assert sampling.top(SCORES, 40) == ORDER


def test_even_ranks_hold_both_ends():
    assert sampling.even_places(10, 4) == [0, 3, 6, 9]
    assert sampling.even_places(10, 3) == [0, 5, 9]
    assert sampling.even_places(10, 1) == [0]
    assert sampling.even_places(4, 4) == sampling.even_places(4, 9) == [0, 1, 2, 3]
    assert sampling.even_ranks(SCORES, 4) == [ORDER[i] for i in (0, 3, 6, 9)]


def test_buckets_share_the_budget_and_short_ones_are_not_filled_up():
    # Ranges of 0.2 from 1 down hold the first three, two, two, one and three.
    scores = [1.0, 0.95, 0.85, 0.7, 0.65, 0.5, 0.45, 0.3, 0.1, 0.05, 0.0]
    assert sampling.buckets(scores, 7, 5) == [0, 2, 3, 4, 5, 7, 8]
    assert sampling.buckets(scores, 12, 5) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert sampling.buckets(scores, 100, 5) == list(range(11))
    assert sampling.buckets([0.5] * 6, 5, 5) == [0]
    assert sampling.buckets([], 5, 5) == []


def test_a_gaussian_prefers_what_is_near_its_peak():
    drawn = [sampling.gaussian([0.9, 0.7, 0.1, -3.0], 2, 0.9, 0.2, random.Random(i)) for i in range(2000)]
    assert all(len(set(each)) == 2 for each in drawn)
    first = [sum(each[0] == i for each in drawn) / len(drawn) for i in range(4)]
    weights = [1.0, 0.6065, 0.000335, 0.0]
    assert first == pytest.approx([w / sum(weights) for w in weights], abs=0.03)
    assert sampling.gaussian([-50.0, -51.0], 1, 0.9, 0.2, random.Random(0)) == [0]


# The course, with answers from a table.


class Table:
    """Answers a course's questions: a prompt's fields say what teacher and student earn."""

    def __init__(self, stop_after=None):
        self.asked, self.rows, self.saved, self.stop_after = [], [], 0, stop_after
        self.round = 0

    def working(self, text):
        return nullcontext()

    def roll_out(self, prompts, group, budget=None, by=None):
        side = "teacher" if isinstance(by, TeacherRollout) else "student"
        self.asked.append((side, [prompt.id for prompt in prompts]))
        rewards = [prompt.fields[side] for prompt in prompts for _ in range(group)]
        lengths = [1 + i % 3 for i in range(len(rewards))]
        made = trajectories_of(lengths, prompts=[prompt for prompt in prompts for _ in range(group)])
        return replace(made, rewards=torch.tensor(rewards, dtype=torch.float32))

    def ask(self, made):
        gaps = torch.tensor([prompt.fields["gap"] for prompt in made.prompts])
        log_p = self.log_probs(made) - gaps.repeat_interleave(made.lengths) / made.lengths.repeat_interleave(
            made.lengths
        )
        return [Target(Sampled(log_p))]

    def log_probs(self, made):
        return torch.linspace(-3, -1, made.positions)

    def gather(self, made, numbers):
        return numbers

    def stop_requested(self):
        return self.stop_after is not None and len(self.asked) >= self.stop_after

    def save(self):
        self.saved += 1

    def record(self, rows):
        self.rows.append(rows)


def prompts_of(pairs):
    """Ids p0, p1, ... with what teacher and student earn, and their gap in nats."""
    return [
        Prompt(f"p{i}", {"prompt": "?", "teacher": t, "student": s, "gap": float(i)}) for i, (t, s) in enumerate(pairs)
    ]


PAIRS = [(0.7, 0.0), (0.69, 0.0), (1.0, 0.9), (1.0, 0.1), (0.9, 0.5), (float("nan"), 0.0), (0.0, 0.0), (0.8, 0.2)]


def course_of(prompts=None, per_step=2, steps=20, **settings):
    settings = Focusing(**{"size": 3, "responses": 2, **settings})
    context = Context(torch.device("cpu"), seed=1, steps=steps)
    return settings.build(prompts or prompts_of(PAIRS), per_step, context)


def test_reliable_is_who_reaches_the_threshold_and_the_largest_gaps_are_taken():
    course, table = course_of(), Table()
    draws = [course.next(step, {}, table) for step in range(2)]
    # p0 has exactly the threshold; p1 misses it, p5 has no verdict, p6 is wrong.
    assert [each for side, ids in table.asked if side == "student" for each in ids] == [
        "p0",
        "p2",
        "p3",
        "p4",
        "p7",
        "p0",
    ]
    drawn = [prompt.id for draw in draws for prompt in draw.prompts]
    assert set(drawn[:3]) == {"p3", "p0", "p7"}
    assert drawn[3] == drawn[0], "the last step is filled up with the first of the round"
    rows = {row["id"]: row for row in table.rows[0]}
    assert rows["p0"] == {
        "round": 1,
        "id": "p0",
        "reliability": pytest.approx(0.7),
        "student": 0.0,
        "disagreement": pytest.approx(0.7),
        "reliable": True,
        "drawn": True,
    }
    assert rows["p5"]["reliability"] is None
    assert rows["p1"]["reliable"] is rows["p1"]["drawn"] is False
    signals = draws[0].signals
    assert signals["curriculum/judged"] == 7
    assert signals["curriculum/reliable"] == pytest.approx(5 / 7)
    assert signals["curriculum/drawn"] == 3
    assert signals["curriculum/disagreement"] == pytest.approx((0.9 + 0.7 + 0.6) / 3)
    assert draws[1].signals == {"curriculum/round": 1.0}


def test_rounds_ask_the_teacher_once_and_the_student_anew():
    prompts = prompts_of(PAIRS)
    course, table = course_of(prompts, epochs=2), Table()
    first = [course.next(step, {}, table) for step in range(3)]
    assert sorted(p.id for draw in first for p in draw.prompts) == sorted(["p0", "p3", "p7"] * 2)
    prompts[3].fields["student"] = 1.0
    second = course.next(3, {}, table)
    assert [side for side, _ in table.asked] == ["teacher", "student", "student"]
    assert second.signals["curriculum/round"] == 2
    assert {row["id"] for row in table.rows[1] if row["drawn"]} == {"p0", "p7", "p4"}
    # Behind the last step nobody is asked.
    assert course_of(steps=5).next(5, {}, None).prompts == []


def test_the_other_reading_goes_by_nats_along_the_students_answers():
    course, table = course_of(disagreement="reverse_kl"), Table()
    course.next(0, {}, table)
    rows = {row["id"]: row for row in table.rows[0]}
    assert {each: rows[each]["disagreement"] for each in ("p0", "p2", "p3", "p4", "p7")} == pytest.approx(
        {"p0": 0.0, "p2": 2.0, "p3": 3.0, "p4": 4.0, "p7": 7.0}, abs=1e-5
    )
    assert {each for each, row in rows.items() if row["drawn"]} == {"p3", "p4", "p7"}


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"reliable_from": 0}, {"p0", "p3", "p1"}),
        ({"sampler": "even_ranks"}, {"p3", "p7", "p2"}),
        ({"sampler": "buckets", "buckets": 2, "size": 2}, {"p3", "p4"}),
        ({"sampler": "gaussian", "peak": 0.1, "width": 0.01, "size": 1}, {"p2"}),
    ],
)
def test_samplers_and_thresholds_choose(settings, taken):
    course, table = course_of(**settings), Table()
    course.next(0, {}, table)
    assert {row["id"] for row in table.rows[0] if row["drawn"]} == taken


def test_any_reliable_prompts_are_taken_without_asking_the_student():
    course, table = course_of(sampler="random"), Table()
    course.next(0, {}, table)
    assert [side for side, _ in table.asked] == ["teacher"]
    drawn = [row for row in table.rows[0] if row["drawn"]]
    assert len(drawn) == 3
    assert all(row["reliable"] and row["student"] is None for row in drawn)


def test_a_course_that_is_stopped_while_it_scores_goes_on_with_the_rest():
    prompts = prompts_of(PAIRS * 5)
    straight, whole = course_of(prompts, size=7, per_step=1), Table()
    expected = [course_ids(straight, step, whole) for step in range(7)]
    assert [len(ids) for _, ids in whole.asked] == [8] * 5 + [8, 8, 8, 1]
    for stop_after in (2, 5, 6, 9):
        course, table = course_of(prompts, size=7, per_step=1), Table(stop_after)
        assert course.next(0, {}, table) is None
        assert table.saved == 1
        again, rest = course_of(prompts, size=7, per_step=1), Table()
        again.load_state_dict(json.loads(json.dumps(course.state_dict())))
        assert [course_ids(again, step, rest) for step in range(7)] == expected
        assert table.asked + rest.asked == whole.asked
        assert rest.rows == whole.rows
    course, table = course_of(prompts, size=7, per_step=1, save_every=16), Table()
    course.next(0, {}, table)
    assert table.saved == 4


def course_ids(course, step, asker):
    return [prompt.id for prompt in course.next(step, {}, asker).prompts]


def test_what_cannot_be_focused_is_refused():
    with pytest.raises(RunError, match=r"reliable on none of 2 prompts \(the best mean reward is 0.2, .* lower it"):
        course_of(prompts_of([(0.2, 0), (0.1, 0)]), size=1).next(0, {}, Table())
    with pytest.raises(opd.OpdError, match=r"curriculum\.size is 9 and there are 8 training prompts"):
        course_of(size=9)
    plain = {
        "student": {"model": "org/none"},
        "teacher": {"model": "org/none"},
        "prompts": {"kind": "inline", "prompts": ["a", "b", "c"]},
        "verifier": "exact_match",
    }
    for changes, own, words in (
        ({"verifier": None}, {}, "key 'verifier' is required: curriculum 'focusing' goes by its verdicts"),
        ({"teacher": [], "objective": "sft", "rollout": {"kind": "data"}}, {}, "key 'teacher' is required: curriculum"),
        ({}, {"teacher": {"kind": "teacher", "teacher": "x"}}, "curriculum.teacher.teacher is 'x'"),
        ({}, {"peak": 0.5}, "peak is read by sampler 'gaussian', and sampler is 'top'"),
        ({}, {"sampler": "random", "disagreement": "reverse_kl"}, "looks at no disagreement"),
    ):
        with pytest.raises(opd.OpdError, match=words):
            parse_recipe({**plain, **changes, "curriculum": {"kind": "focusing", "size": 2, **own}})


# Runs.

ROWS = [{"id": f"r{i}", "prompt": f"{i}+1=", "answer": "a"} for i in range(12)]


def trained(folder, steps=4, **changes):
    settings = {
        "steps": steps,
        "batch": {"prompts": 2, "micro": 3},
        "rollout": {"max_new_tokens": 3},
        # Tiny models answer anything; a right answer has an even first letter in some order.
        "verifier": {"kind": "first_letter_of_a_test"},
        "curriculum": {
            "kind": "focusing",
            "size": 4,
            "responses": 2,
            "reliable_from": 0.01,
            "teacher": {"kind": "teacher", "max_new_tokens": 3},
        },
        "objective": "reverse_kl_sampled",
        "reduction": "sequence_sum",
        "evaluation": {"held_out": 2},
        "checkpoint": {"every": 1},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "update": {"learning_rate": 1e-2},
        "output": str(folder),
        **changes,
    }
    resume = settings.pop("resume", False)
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    tokenizer = character_tokenizer()
    result = opd.distill(student, teacher, ROWS, tokenizer=tokenizer, quiet=True, resume=resume, **settings)
    return result, {name: p.detach().clone() for name, p in student.named_parameters()}


class FirstLetter(opd.verifiers.CompletionVerifier):
    """A reward that some answers earn, by their first letter."""

    kind: Literal["first_letter_of_a_test"] = "first_letter_of_a_test"

    def score(self, prompt, completion):
        return (ord(completion[:1] or "a") % 5) / 4


def rows_of(folder):
    return [json.loads(line) for line in (folder / "curriculum.jsonl").read_text().splitlines()]


def test_a_run_that_is_stopped_amid_a_pass_and_resumed_ends_like_one_that_is_not(tmp_path, monkeypatch):
    result, weights = trained(tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    assert len(rows) == 2 * 10
    assert [row["step"] for row in rows] == [0] * 10 + [2] * 10
    drawn = {row["id"] for row in rows if row["drawn"] and row["round"] == 1}
    assert len(drawn) == 4
    steps = [record for record in result.history if "train/loss" in record]
    assert [record["train/curriculum/round"] for record in steps] == [1, 1, 2, 2]
    logged = [json.loads(line) for line in (tmp_path / "whole" / "rollouts.jsonl").read_text().splitlines()]
    assert {row["id"] for row in logged if row["step"] <= 2} <= drawn
    assert steps[0]["train/sampled_tokens"] > steps[1]["train/sampled_tokens"]

    # Asked to stop at the second round's first block, and as the first round's teacher is done.
    for name, at in (("early", 1), ("late", 3)):
        asked = []

        def stop_requested(self, asked=asked, at=at):
            asked.append(1)
            if len(asked) == at:
                self.run.monitor.stop_requested = True
            return self.run.stop_requested()

        with monkeypatch.context() as patch:
            patch.setattr(RunAsker, "stop_requested", stop_requested)
            trained(tmp_path / name)
        rolled = []
        roll_out = RunAsker.roll_out

        def counted(self, *given, rolled=rolled, roll_out=roll_out, **named):
            rolled.append(1)
            return roll_out(self, *given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(RunAsker, "roll_out", counted)
            _, again = trained(tmp_path / name, resume="auto")
        assert len(rolled) == 3 - at
        assert rows_of(tmp_path / name) == rows
        for key, value in again.items():
            assert torch.equal(value, weights[key]), key


def test_a_run_goes_by_nats_where_it_is_told(tmp_path):
    curriculum = {"kind": "focusing", "size": 2, "responses": 1, "reliable_from": 0, "disagreement": "reverse_kl"}
    curriculum |= {"student": {"kind": "student", "top_k": 1, "max_new_tokens": 3}}
    curriculum |= {"teacher": {"kind": "teacher", "top_k": 1, "max_new_tokens": 3}}
    result, _ = trained(tmp_path, steps=1, curriculum=curriculum)
    rows = rows_of(tmp_path)
    taken = sorted((row["disagreement"] for row in rows if row["drawn"]), reverse=True)
    assert taken == sorted((row["disagreement"] for row in rows), reverse=True)[:2]
    assert len({row["disagreement"] for row in rows}) > 3
    assert result.history
