"""A curriculum asks student and teacher at the start of each round, and draws the prompts on which they disagree."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from pydantic import Field

import opd
from opd.curricula import Course, Curriculum, Draw
from opd.distributions import Sampled
from opd.errors import RunError
from opd.rollouts.teacher import TeacherRollout
from opd.run import Run
from tests.conftest import character_tokenizer, tiny_model, trajectories_of

TEXTS = [f"{a}+{b}=" for a in range(1, 4) for b in range(1, 5)]


class Disagreement(Curriculum):
    """The prompts on which the student's own answer has the largest reverse KL, chosen anew each round."""

    kind: Literal["disagreement_of_a_test"] = "disagreement_of_a_test"
    steps_per_round: int = Field(2, ge=1, description="Steps between two choices")

    def build(self, prompts, per_step, context):
        return DisagreementCourse(self, prompts, per_step, context.steps)


MADE = []
"""Every course that was built."""


class DisagreementCourse(Course):
    def __init__(self, settings, prompts, per_step, steps):
        self.settings, self.prompts, self.per_step, self.steps = settings, list(prompts), per_step, steps
        self.scores, self.seen, self.chosen = [], [], []
        MADE.append(self)

    def next(self, step, signals, asker):
        # Asked after the last step too, when nothing more is drawn.
        if step % self.settings.steps_per_round == 0 and step < self.steps:
            self._score(asker)
        return Draw(self.chosen)

    def _score(self, asker):
        written = asker.roll_out(self.prompts, group=1, budget=4)
        assert written.lengths.max() <= 4
        assert not written.rewards.isnan().any()
        (answer,) = asker.ask(written)
        log_p = Sampled.of(answer.distribution, written.actions).log_probs
        gap = written.behaviour_log_probs - log_p
        torch.testing.assert_close(asker.log_probs(written), written.behaviour_log_probs, atol=1e-5, rtol=1e-5)
        by_prompt = torch.stack([row.mean() for row in torch.split(gap, written.lengths.tolist())])
        scores = asker.gather(written, by_prompt)
        assert scores.shape == (len(self.prompts),)
        taught = asker.roll_out(self.prompts[:3], group=2, by=TeacherRollout(max_new_tokens=5))
        assert len(taught) == 6
        log_p = Sampled.of(asker.ask(taught)[0].distribution, taught.actions).log_probs
        torch.testing.assert_close(log_p, taught.behaviour_log_probs, atol=1e-4, rtol=1e-4)
        self.scores.append(scores)
        self.chosen = [self.prompts[i] for i in scores.argsort(descending=True)[: self.per_step].tolist()]

    def saw(self, trajectories, values, signals, gather):
        rewards = gather(trajectories, trajectories.rewards).view(len(self.chosen), -1)
        assert {"divergence", "weight"} <= values.keys()
        assert values["divergence"].shape == (trajectories.positions,)
        self.seen.append((rewards.nanmean(1), signals["loss"]))
        return {}

    def state_dict(self):
        return {"chosen": [prompt.id for prompt in self.chosen]}

    def load_state_dict(self, state):
        self.chosen = [prompt for prompt in self.prompts if prompt.id in state["chosen"]]


class Back(Curriculum):
    """Every prompt at each step; at the end the student is as it was after the first step."""

    kind: Literal["back_of_a_test"] = "back_of_a_test"

    def build(self, prompts, per_step, context):
        return BackCourse(list(prompts), context.steps)


class BackCourse(Course):
    def __init__(self, prompts, steps):
        self.prompts, self.steps = prompts, steps

    def next(self, step, signals, asker):
        if step == 0:
            assert not asker.restore_weights()
        if step == 1:
            asker.keep_weights()
        if step == self.steps:
            assert asker.restore_weights()
        return Draw(self.prompts)


def trained(folder, **changes):
    settings = {
        "steps": 4,
        "batch": {"prompts": 4, "group": 2, "micro": 3},
        "rollout": {"max_new_tokens": 8},
        "verifier": "exact_match",
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "update": {"learning_rate": 1e-2},
        "output": str(folder),
        **changes,
    }
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    rows = [{"prompt": text, "answer": "7"} for text in TEXTS]
    return opd.distill(student, teacher, rows, tokenizer=character_tokenizer(), quiet=True, **settings), student


def test_a_course_scores_all_prompts_and_draws_those_of_disagreement(tmp_path):
    result, _ = trained(tmp_path, curriculum="disagreement_of_a_test")
    course = MADE[-1]
    assert len(course.scores) == 2
    assert not torch.equal(*course.scores), "the second round scores the student as it is then"
    assert len(course.seen) == 4
    steps = [r for r in result.history if "train/loss" in r]
    assert [loss for _, loss in course.seen] == [r["train/loss"] for r in steps]
    # What was written and scored for a round is counted to the step that begins it.
    asked = ["train/seconds/curriculum" in r for r in steps]
    assert asked == [True, False, True, False]
    for r in steps:
        extra = r["train/teacher_tokens"] - r["train/positions"]
        assert extra == r["train/sampled_tokens"] - r["train/positions"]
        assert (extra > 0) == ("train/seconds/curriculum" in r)
        assert r.get("train/seconds/curriculum", 0) <= r["train/seconds/step"]
    ranked = {p.id for p in course.chosen}
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows if row["step"] == 4} <= ranked


def test_asking_moves_no_draw_of_training(tmp_path, monkeypatch):
    """The same prompts in the same order with and without questions: the same steps, bit for bit."""

    class Quiet(DisagreementCourse):
        def _score(self, asker):
            self.chosen = self.prompts[: self.per_step]

    class Asking(DisagreementCourse):
        def _score(self, asker):
            super()._score(asker)
            self.chosen = self.prompts[: self.per_step]

    losses = []
    for course in (Quiet, Asking):

        def build(self, prompts, per_step, context, course=course):
            return course(self, prompts, per_step, context.steps)

        monkeypatch.setattr(Disagreement, "build", build)
        result, _ = trained(tmp_path / course.__name__, curriculum="disagreement_of_a_test")
        losses.append([r["train/loss"] for r in result.history if "train/loss" in r])
    assert losses[0] == losses[1]


def test_a_course_has_weights_kept_and_restored(tmp_path):
    _, once = trained(tmp_path / "a", steps=1, curriculum="back_of_a_test")
    after_one = {name: p.clone() for name, p in once.named_parameters()}
    result, student = trained(tmp_path / "b", steps=3, curriculum="back_of_a_test")
    assert result.summary["steps"] == 3
    assert len([r for r in result.history if "train/loss" in r]) == 3
    for name, weight in student.named_parameters():
        assert torch.equal(weight, after_one[name])


def test_numbers_of_several_processes_come_in_the_order_of_the_prompts(monkeypatch):
    """Five prompts, two trajectories each, on two processes: the first has prompts 0, 2 and 4, the second 1 and 3."""
    found = torch.arange(10.0)
    shares = [[found[2 * i : 2 * i + 2] for i in range(process, 5, 2)] for process in range(2)]
    made = replace(trajectories_of([1] * 6), groups=torch.tensor([0, 0, 1, 1, 2, 2]))

    def gather_object(own):
        assert [part.tolist() for _, part in own[0]] == [part.tolist() for part in shares[0]]
        return [own[0], list(enumerate(shares[1]))]

    monkeypatch.setattr("opd.run.gather_object", gather_object)
    assert torch.equal(Run.gather(None, made, torch.cat(shares[0])), found)
    # The first prompt of the first process was lost: the others keep their order.
    left, _ = made.pick([2, 3, 4, 5])
    monkeypatch.setattr("opd.run.gather_object", lambda own: [own[0], list(enumerate(shares[1]))])
    assert torch.equal(Run.gather(None, left, torch.cat(shares[0][1:])), found[2:])


def test_prompts_that_processes_cannot_share_are_refused():
    processes = SimpleNamespace(num_processes=4, process_index=1, is_fsdp2=False)
    run = SimpleNamespace(accelerator=processes, share=lambda prompts: prompts[1::4])
    assert Run.share_of_draw(run, list(range(6))) == [1, 5]
    with pytest.raises(RunError, match="names 3 prompts, and each of the 4 processes needs one; name more"):
        Run.share_of_draw(run, list(range(3)))
    processes.is_fsdp2 = True
    with pytest.raises(RunError, match=r"names 6 prompts, .* as many as the others"):
        Run.share_of_draw(run, list(range(6)))
