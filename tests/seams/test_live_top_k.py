"""A live teacher that answers only its most likely tokens trains a student and measures it, like a server does."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field

import opd
from opd.distributions import Target, TopK
from opd.schedules import OverSteps
from opd.teachers import LiveTeacher, Teacher
from opd.teachers.local import LocalTeacher
from tests.conftest import save_tiny
from tests.test_loop import TEXTS


class Remote(Teacher):
    """The K most likely tokens of a model that stands elsewhere."""

    kind: Literal["remote_top_k"] = "remote_top_k"
    model: str
    top: Annotated[int, OverSteps(ge=1)] = Field(8, description="K")

    def build(self, context, student):
        return LiveRemote(self, LocalTeacher(model=self.model, template="plain").build(context, student))


class LiveRemote(LiveTeacher):
    answers = TopK

    def __init__(self, settings, behind):
        self.settings, self.behind = settings, behind

    @torch.no_grad()
    def answer(self, trajectories, settings, context):
        SEEN.append((settings.top, context.temperature))
        (whole,) = self.behind.answer(trajectories, self.behind.settings, context)
        return [Target(TopK.of(whole.distribution, settings.top))]


SEEN: list[tuple[int, float]] = []


def test_a_live_teacher_that_answers_top_k_trains_and_measures(tmp_path):
    models = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2)
    SEEN.clear()
    result = opd.distill(
        {"model": models[0], "template": "plain"},
        {"kind": "remote_top_k", "model": models[1], "top": {"kind": "hold", "points": [[0, 8], [20, 4]]}},
        TEXTS,
        quiet=True,
        steps=30,
        objective={"kind": "reverse_kl", "top_k": 4},
        temperature=[[0, 1.0], [30, 0.8]],
        rollout={"max_new_tokens": 8},
        batch={"prompts": 8, "micro": 4},
        update={"learning_rate": 1e-2},
        evaluation={"held_out": 4, "samples": 1},
        tracking={"trackers": []},
        hardware={"device": "cpu", "threads": 1},
        output=str(tmp_path / "run"),
    )
    assert result.after["reverse_kl_top_k"] < 0.8 * result.before["reverse_kl_top_k"]
    assert "forward_kl_top_k" in result.after
    assert "reverse_kl" not in result.after
    assert {top for top, _ in SEEN} == {4, 8}, "settings of a step reach the teacher"
    assert SEEN[-1][1] == pytest.approx(1 - 0.2 * 29 / 30), "and so does the temperature"


def test_an_objective_that_needs_more_is_refused(tmp_path):
    models = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2)
    with pytest.raises(opd.OpdError, match="top_k"):
        opd.distill(
            {"model": models[0], "template": "plain"},
            {"kind": "remote_top_k", "model": models[1]},
            TEXTS,
            quiet=True,
            objective="reverse_kl_sampled",
            evaluation={"held_out": 4},
            tracking={"trackers": []},
            hardware={"device": "cpu"},
            output=str(tmp_path / "run"),
        )
