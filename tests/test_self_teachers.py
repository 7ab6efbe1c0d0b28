"""Teachers that are made of the student: which weights they have after a step, and what the mean of logits is."""

from __future__ import annotations

import pytest
import torch

from opd.errors import IncompatibleError
from opd.prompts import Prompt
from opd.teachers.self_teacher import SelfTeacher, TrustRegionTeacher
from tests.conftest import said, trajectories_of


def moved(student, amount=0.1):
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("mode", "share"), [("ema", 0.25), ("frozen", 0.0), ("live", 1.0)])
def test_how_far_it_follows(student, mode, share):
    settings = SelfTeacher(mode=mode, **({"rate": share} if mode == "ema" else {}))
    teacher = settings.build(student.context, student)
    before = {name: p.clone() for name, p in student.module.named_parameters()}
    moved(student)
    teacher.follow(student)
    now = dict(student.module.named_parameters())
    for name, own in teacher.language.named_parameters():
        torch.testing.assert_close(own, (1 - share) * before[name] + share * now[name])
        assert not own.requires_grad


def test_a_trust_region_is_the_mean_of_initial_and_live_logits(student):
    teacher = SelfTeacher(mode="trust_region", rate=0.3).build(student.context, student)
    assert isinstance(teacher, TrustRegionTeacher)
    prompts = [Prompt(f"t{i}", {"prompt": "12+7="[: 3 + i]}) for i in range(2)]
    contexts = [student.language.encode(prompt) for prompt in prompts]
    trajectories = trajectories_of([3, 4], contexts, prompts=prompts)
    student.context = student.context.with_(temperature=0.7)
    with torch.no_grad():
        first = student(trajectories).head.logits(student(trajectories).hidden)
        moved(student)
        teacher.follow(student)
        live = student(trajectories).head.logits(student(trajectories).hidden)
        answer = said(teacher, trajectories, student.context)
        torch.testing.assert_close(answer.head.logits(answer.hidden), 0.7 * first + 0.3 * live, atol=1e-4, rtol=1e-4)
    # What moves of it is what a checkpoint holds; the rest is known by a fingerprint.
    other = SelfTeacher(mode="trust_region", rate=0.3).build(student.context, student)
    other.load_state_dict(teacher.state_dict())
    assert {n: p.sum() for n, p in other.state_dict().items()} == {n: p.sum() for n, p in teacher.state_dict().items()}
    assert other.fingerprint() != teacher.fingerprint()


def test_what_has_no_share_of_the_student_takes_none():
    for mode in ("frozen", "live"):
        with pytest.raises(ValueError, match=rf"mode: {mode} has no share of the student to set"):
            SelfTeacher(mode=mode, rate=0.5)


def test_capped_logits_have_no_mean(student, monkeypatch):
    teacher = SelfTeacher(mode="trust_region").build(student.context, student)
    monkeypatch.setattr(teacher.language.base.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(IncompatibleError, match=r"mode: trust_region takes a mean of logits, and .* caps its logits"):
        teacher.check_student(student, student.context)
