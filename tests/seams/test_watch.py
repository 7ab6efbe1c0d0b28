"""A watch from outside: it scores with student and teacher while rows are written, ends those on which they part, and
what the teacher said travels with the trajectories."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from pydantic import Field

from opd.api import execute
from opd.assembly import assemble
from opd.distributions import Categorical, Target
from opd.language.engines.base import followed_by
from opd.monitor import Monitor
from opd.recipe import parse_recipe
from opd.watches import Findings, LiveWatch, Watch
from tests.conftest import rolled_out, save_tiny

TEXTS = [f"{a}+{b}=" + "?" * (a % 3) for a in range(1, 6) for b in range(1, 5)]


def shared(student, teacher, k):
    """float32 `[N]`: the share of the k likeliest ids that two distributions have in common."""
    own, theirs = (each.log_probs().topk(k).indices for each in (student, teacher))
    return (own[:, :, None] == theirs[:, None]).any(-1).float().mean(-1)


class Overlap(Watch):
    """Ends a row when over a segment its teacher's likeliest ids are too few of the student's."""

    kind: Literal["overlap_in_a_test"] = "overlap_in_a_test"
    k: int = Field(8, description="Ids that are compared")
    least: float = Field(0.2, description="Mean share over a segment below which a row ends")

    def build(self, context, student, teachers):
        return OverlapWatch(student, teachers[0])


class OverlapWatch(LiveWatch):
    def __init__(self, student, teacher):
        self.student, self.teacher = student.language, teacher

    def begin(self, rows):
        reader, sees = self.teacher.language, self.teacher.settings.sees
        begun = list(zip(rows.prompts, rows.begun, strict=True))
        views = [followed_by(reader.encode(prompt, sees), start) for prompt, start in begun]
        own = [followed_by(self.student.encode(prompt), start) for prompt, start in begun]
        self.scorers = self.student.scorer(own, rows.context), reader.scorer(views, rows.context)
        self.scored = [0] * len(rows)
        self.overlaps, self.answers = [[[] for _ in range(len(rows))] for _ in range(2)]

    def score(self, rows):
        """Overlaps of each row's new tokens."""
        new = {
            place: actions[self.scored[place] :]
            for place, actions in enumerate(rows.actions)
            if len(actions) > self.scored[place]
        }
        if not new:
            return {}
        mine, said = (scorer.extend(new) for scorer in self.scorers)
        lengths = [len(tokens) for tokens in new.values()]
        overlaps = torch.split(shared(mine, said, rows.settings.k), lengths)
        for place, overlap, hidden in zip(new, overlaps, torch.split(said.hidden, lengths), strict=True):
            self.scored[place] += len(overlap)
            self.overlaps[place].append(overlap)
            self.answers[place].append(hidden)
        return dict(zip(new, overlaps, strict=True))

    def look(self, rows):
        overlaps = self.score(rows)
        parted = {p: "student and teacher part" for p in rows.going if overlaps[p].mean() < rows.settings.least}
        over = sorted((set(overlaps) - set(rows.going)) | parted.keys())
        for scorer in self.scorers:
            scorer.drop(over)
        return parted

    def end(self, rows):
        self.score(rows)
        hidden = torch.cat([part for row in self.answers for part in row])
        head = self.teacher.language.head_of(rows.context).detach()
        answer = Target(Categorical(hidden, head), teacher=self.teacher.settings.name)
        return Findings({"overlap": torch.cat([part for row in self.overlaps for part in row])}, (answer,))


WATCHED = {"kind": "student", "max_new_tokens": 24, "segment": 5, "batch": 6, "watch": "overlap_in_a_test"}


def recipe_for(tmp_path, rollout, **changes):
    return parse_recipe(
        {
            "output": str(tmp_path / "run"),
            "steps": 2,
            "student": {"model": save_tiny(tmp_path / "student", seed=1), "template": "plain"},
            "teacher": {
                "model": save_tiny(tmp_path / "teacher", seed=2, vocabulary=72),
                "template": "plain",
                "name": "expert",
            },
            "prompts": {"kind": "inline", "prompts": TEXTS},
            "rollout": rollout,
            "batch": {"prompts": 6, "group": 2, "micro": 5},
            "update": {"learning_rate": 1e-2},
            "evaluation": {"held_out": 4, "samples": 1},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
            **changes,
        }
    )


@pytest.fixture
def run(tmp_path):
    """A run, and its first step's trajectories."""

    def make(rollout):
        (tmp_path / "run").mkdir(exist_ok=True)
        made = assemble(recipe_for(tmp_path, rollout), Monitor(tmp_path / "run", quiet=True))
        return made, rolled_out(made, made.course.next(0, {}, None).prompts, 2, 24)

    return make


def test_rows_end_where_student_and_teacher_part_and_what_was_scored_is_kept(run):
    made, watched = run(WATCHED)
    _, plain = run({"kind": "student", "max_new_tokens": 24})
    stopped = [reason is not None for reason in watched.stopped]
    assert 0 < sum(stopped) < len(stopped)
    overlaps = torch.split(watched.columns["overlap"], watched.lengths.tolist())
    for i, (own, before) in enumerate(zip(watched.completions(), plain.completions(), strict=True)):
        assert torch.equal(own, before[: len(own)])
        assert stopped[i] or len(own) == len(before)
        looks = [float(overlaps[i][at : at + 5].mean()) for at in range(0, len(own) - 4, 5)]
        # What ended by itself or at the budget was not being written any more.
        if not stopped[i] and len(own) % 5 == 0:
            looks = looks[:-1]
        assert [look < 0.2 for look in looks] == [False] * (len(looks) - 1) + [stopped[i]] * bool(looks)

    with torch.no_grad():
        student, (asked,) = made.student(watched), made.ask(watched, made.at(0))
    (kept,) = watched.answers
    assert (kept.teacher, kept.weight) == (asked.teacher, asked.weight) == ("expert", 1.0)
    torch.testing.assert_close(kept.distribution.log_probs(), asked.distribution.log_probs(), atol=1e-4, rtol=1e-4)
    again = shared(student, asked.distribution, 8)
    assert ((again - watched.columns["overlap"]).abs() < 1e-6).float().mean() > 0.99


def test_columns_and_answers_go_with_the_trajectories_of_each_micro_batch(run):
    _, watched = run(WATCHED)
    picked, here = watched.pick([5, 1])
    assert torch.equal(picked.columns["overlap"], watched.columns["overlap"][here])
    assert torch.equal(picked.answers[0].distribution.hidden, watched.answers[0].distribution.hidden[here])
    assert picked.stopped == [watched.stopped[5], watched.stopped[1]]


@pytest.mark.parametrize("segment", [1, 3, 24])
def test_neither_draws_nor_answers_depend_on_how_often_a_watch_looks(segment, run):
    never = {"kind": "overlap_in_a_test", "least": 0.0}
    _, seldom = run({**WATCHED, "watch": never, "segment": 7})
    _, often = run({**WATCHED, "watch": never, "segment": segment, "batch": 64})
    assert torch.equal(often.actions, seldom.actions)
    assert torch.equal(often.lengths, seldom.lengths)
    assert torch.equal(often.finished, seldom.finished)
    one, other = (each.answers[0].distribution.hidden for each in (often, seldom))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_part_that_nobody_watched_has_no_overlap_and_its_teacher_is_asked(run):
    _, mixed = run({"kind": "mixture", "first": WATCHED, "second": "student", "share": 0.5})
    known = ~mixed.columns["overlap"].isnan()
    assert 0 < int(known.sum()) < len(known)
    assert mixed.answers is None
    _, switched = run({"kind": "switch", "first": "student", "then": WATCHED, "position": 4})
    begun = torch.cat([torch.arange(length) < 4 for length in switched.lengths])
    assert torch.equal(switched.columns["overlap"].isnan(), begun)


def test_the_loop_trains_on_watched_rows_and_logs_how_many_ended(tmp_path):
    result = execute(recipe_for(tmp_path, WATCHED), quiet=True)
    logged = [row for row in result.history if "train/loss" in row]
    assert len(logged) == 2
    assert all(0 < row["train/stopped"] <= row["train/truncated"] for row in logged)
