"""The reproduction of VLA-OPD: its premise, what its arms differ in, and the figures that its claims are about."""

from __future__ import annotations

import math

import pytest

from opd.environments.pixel_pick import tasks_of
from opd.recipe import differences
from reproductions.vla_opd import ARMS, EXACT, EXPERTS, FORWARD, GRPO, GRPO_STEPS, HARD, OPD, SFT, STEPS, early, speed
from reproductions.vla_opd_models import (
    HELD_OUT,
    NEW,
    SEEN,
    SUITE,
    TEST,
    TRAIN,
    VALIDATION,
    blank,
    demonstrated,
    episodes,
    success,
)
from reproductions.vla_opd_premise import verdict


def test_tasks_are_trained_or_held_out_and_no_initial_state_serves_twice():
    assert sorted(SEEN + HELD_OUT) == sorted(tasks_of(SUITE))
    assert not set(SEEN) & set(HELD_OUT)
    assert len({TRAIN, VALIDATION, TEST}) == 3


def changed(name):
    return {key.split(".")[0] for key, _, _ in differences(ARMS[OPD], ARMS[name])}


def test_an_arm_changes_what_it_is_named_after():
    assert changed(EXACT) == changed(FORWARD) == changed(HARD) == {"objective"}
    assert changed(EXPERTS) == {"objective", "prompts", "rollout"}
    assert changed(SFT) == {"objective", "prompts", "rollout", "teacher"}
    assert changed(GRPO) == {"objective", "teacher", "batch", "steps"}
    episodes = [ARMS[name]["batch"]["prompts"] * ARMS[name]["batch"]["group"] for name in (OPD, GRPO)]
    assert episodes[0] == episodes[1]
    assert GRPO_STEPS == 3 * STEPS, "a third of the steps is what is claimed"


def test_speed_is_in_thirds_and_counts_the_teachers_steps_where_it_should():
    curve = [
        {"step": 0, "accuracy": 0.9, "simulator_steps": 0.0},
        {"step": 5, "accuracy": 0.5, "simulator_steps": 900.0},
        {"step": 10, "accuracy": 0.8, "simulator_steps": 2700.0},
        {"step": 15, "accuracy": 0.7, "simulator_steps": 8100.0},
    ]
    found = speed(curve, 0.75, 5400.0)
    assert found["log_steps"] == pytest.approx(math.log(2700, 3))
    assert found["log_steps_with_teacher"] - found["log_steps"] == pytest.approx(1.0)
    assert speed(curve, 0.95, 0.0)["log_steps"] == pytest.approx(math.log(8100, 3)), "it never gets there"


def test_early_is_the_first_third():
    curve = [{"step": s, "student_entropy": float(s)} for s in (0, 5, 10, 15, 20, 25, 30)]
    assert early(curve) == 7.5


def test_the_premise_needs_a_middling_start_and_a_good_teacher():
    figures = {"start": 0.35, "teacher": 0.97}
    assert verdict(figures)[0]
    for name, worse in (("start", 0.1), ("start", 0.7), ("teacher", 0.9)):
        assert not verdict({**figures, name: worse})[0]


def test_the_start_is_measured_on_the_tasks_that_are_named(tmp_path):
    (tmp_path / "new").mkdir()
    blank(tmp_path / "new", {}, seed=0)
    found = success(tmp_path / "run", tmp_path / "new" / "model", episodes(1, TEST, SEEN[:2]), 0)
    assert {"accuracy", f"accuracy/{SEEN[0]}", f"accuracy/{SEEN[1]}"} <= found.keys()
    (tmp_path / "data").mkdir()
    made = demonstrated(tmp_path / "data", {NEW: tmp_path / "new"}, of=NEW, per_task=1, only=SEEN[:2])
    assert made == {"kept": 2.0, "played": 2.0}
