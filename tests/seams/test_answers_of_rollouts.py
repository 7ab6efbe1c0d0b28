"""A rollout that asks the run's teacher while it writes brings the answers along, and nobody asks again."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

import opd
from opd.api import execute
from opd.distributions import joined_targets
from opd.loop import train
from opd.rollouts import PrefixSource, Request
from opd.rollouts.base import OneSource
from opd.rollouts.student import StudentRollout
from opd.teachers.local import LanguageTeacher
from opd.trajectories import Trajectories, continued
from tests.conftest import save_tiny
from tests.test_loop import build, recipe_for

BLOCK = 3


class DraftBlocks(OneSource):
    """The student drafts blocks of three tokens; the teacher looks at each block before the next one is drafted."""

    kind: Literal["draft_blocks"] = "draft_blocks"
    keep_answers: bool = True
    misnamed: bool = False

    def build(self, context, student, teachers):
        drafter = StudentRollout().build(context, student, teachers)
        return Drafting(drafter, teachers[0])


class Drafting(PrefixSource):
    def __init__(self, drafter: PrefixSource, teacher: LanguageTeacher):
        self.drafter, self.teacher = drafter, teacher

    def __call__(self, request: Request[DraftBlocks]) -> Trajectories:
        own = StudentRollout()
        made = self._looked_at(self.drafter(request.to(own, budget=min(BLOCK, request.budget))), None, request)
        for done in range(BLOCK, request.budget, BLOCK):
            going = [i for i, ended in enumerate(made.finished.tolist()) if not ended]
            if not going:
                break
            begun = made.completions()
            asked = replace(
                request.to(own, budget=min(BLOCK, request.budget - done)),
                prompts=[made.prompts[i] for i in going],
                group=1,
                begun=[begun[i] for i in going],
                stream=request.stream + 1000 * done,
            )
            made = continued(made, going, self._looked_at(self.drafter(asked), asked.begun, request))
        slots = torch.cat([torch.arange(n) % BLOCK for n in made.lengths.tolist()])
        made = replace(made, columns={"slot": slots})
        if not request.settings.keep_answers:
            return replace(made, answers=None)
        if request.settings.misnamed:
            return replace(made, answers=tuple(replace(t, teacher="nobody") for t in made.answers))
        return made

    def _looked_at(self, block: Trajectories, begun, request) -> Trajectories:
        """The block with what the teacher says at its positions."""
        whole = block
        if begun is not None:
            pairs = list(zip(begun, block.completions(), strict=True))
            actions = torch.cat([torch.cat(pair) for pair in pairs])
            ones = torch.ones_like(actions, dtype=torch.bool)
            whole = replace(
                block,
                actions=actions,
                lengths=torch.tensor([len(a) + len(b) for a, b in pairs]),
                behaviour_log_probs=torch.zeros(len(actions)),
                learn=ones,
                authors=torch.zeros_like(actions, dtype=torch.uint8),
            )
        targets = self.teacher.answer(whole, self.teacher.settings, request.context)
        starts = [0] * len(block) if begun is None else [len(b) for b in begun]
        ends = whole.lengths.cumsum(0).tolist()
        here = [torch.arange(e - n, e) for e, n in zip(ends, block.lengths.tolist(), strict=True)]
        assert [int(w - n) for w, n in zip(whole.lengths, block.lengths, strict=True)] == starts
        return replace(block, answers=tuple(t.select(torch.cat(here)) for t in targets))


@pytest.fixture
def models(tmp_path):
    return save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)


def recipe_of(models, tmp_path, rollout=None, **changes):
    teacher = {"model": models[1], "template": "plain", "name": "target", "weight": [[0, 1.0], [2, 0.5]]}
    rollout = {"kind": "draft_blocks", "max_new_tokens": 8, **(rollout or {})}
    batch = {"prompts": 4, "group": 2, "micro": 3}
    return recipe_for(models, tmp_path, teacher=teacher, rollout=rollout, batch=batch, end_tokens=[0, 8], **changes)


def test_drafted_blocks_bring_their_targets_and_the_teacher_is_not_asked_again(models, tmp_path, monkeypatch):
    scored, answer = [], LanguageTeacher.answer

    def counted(self, trajectories, settings, context):
        scored.append(trajectories.positions)
        return answer(self, trajectories, settings, context)

    monkeypatch.setattr(LanguageTeacher, "answer", counted)
    run = build(recipe_of(models, tmp_path), tmp_path)
    now = run.at(1)
    made = run.rollout(now.request(run.course.next(0, {}, None).prompts, stream=0))
    assert made.lengths.max() > BLOCK, "several blocks were drafted"
    scored.clear()
    (target,) = run.ask(made, now)
    assert scored == []
    assert (target.teacher, target.weight) == ("target", 0.75)
    # What was said block by block is what the teacher says of the whole.
    (again,) = run.ask(replace(made, answers=None), now)
    assert scored == [made.positions]
    torch.testing.assert_close(target.distribution.log_probs(), again.distribution.log_probs(), atol=1e-5, rtol=1e-5)
    assert again.weight == target.weight


def test_the_steps_are_those_of_a_run_that_asks_afterwards(models, tmp_path):
    runs = [
        execute(recipe_of(models, tmp_path / str(kept), {"keep_answers": kept}), quiet=True) for kept in (True, False)
    ]
    steps = [[r for r in run.history if "train/loss" in r] for run in runs]
    for name in ("train/loss", "train/gradient_norm"):
        brought, asked = ([r[name] for r in each] for each in steps)
        assert brought == pytest.approx(asked, rel=1e-4)
    for records in steps:
        assert all(r["train/teacher_tokens"] == r["train/sampled_tokens"] for r in records), "each state once"


def test_an_answer_of_nobody_is_refused(models, tmp_path):
    run = build(recipe_of(models, tmp_path, {"misnamed": True}), tmp_path)
    with pytest.raises(opd.OpdError, match=r"answer of teacher 'nobody'.*\['target'\]"):
        train(run)


def test_parts_of_one_teachers_answer_join_to_the_whole(models, tmp_path):
    run = build(recipe_of(models, tmp_path), tmp_path)
    made = run.rollout(run.at(0).request(run.course.next(0, {}, None).prompts, stream=0))
    (target,) = made.answers
    odd = torch.arange(made.positions) % 2 == 1
    places = [(~odd).nonzero()[:, 0], odd.nonzero()[:, 0]]
    both = joined_targets([target.select(mine) for mine in places], places)
    torch.testing.assert_close(both.distribution.log_probs(), target.distribution.log_probs())
