"""A drafter that is trained beside the student whose rollouts it makes cheaper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import opd
from opd.api import execute
from opd.loop import train
from tests.conftest import rolled_out
from tests.processes import together
from tests.test_drafted_rollouts import drafters, engine, models
from tests.test_loop import build, recipe_for

__all__ = ["drafters", "models"]


def beside(models, tmp_path, drafter, engine_settings=None, learning=None, **changes):
    learning = {"learning_rate": 3e-3, **(learning or {})}
    rollout = {"engine": engine(drafter, train=learning, **(engine_settings or {})), **changes.pop("rollout", {})}
    return recipe_for(models, tmp_path, rollout=rollout, **changes)


def state(run):
    return {name: weight.clone() for name, weight in run.rollout.writer.drafter.state_dict().items()}


@pytest.mark.parametrize("form", ["block", "chain of some ids"])
def test_the_students_run_is_the_one_without_and_the_drafter_gains(models, drafters, tmp_path, form):
    common = {"steps": 5, "self_test": False, "rollout": {"top_k": 1}, "evaluation": {"held_out": 1}}
    alone = execute(recipe_for(models, tmp_path / "a", **common), quiet=True)
    result = execute(
        beside(models, tmp_path / "b", drafters[form], learning={"learning_rate": 1e-2}, **common), quiet=True
    )
    steps = [record for record in result.history if "train/loss" in record]
    for name in ("train/loss", "train/sampled_tokens"):
        one = [record[name] for record in alone.history if name in record]
        assert [record[name] for record in steps] == pytest.approx(one, rel=1e-3)
    losses = [record["train/engine/drafter_loss"] for record in steps]
    assert losses[-1] < 0.7 * losses[0]
    assert all(record["train/engine/drafter_gradient_norm"] > 0 for record in steps)
    assert steps[-1]["train/engine/acceptance_length"] > steps[0]["train/engine/acceptance_length"]


def test_what_it_became_is_saved_beside_the_student_and_proposes_elsewhere(models, drafters, tmp_path):
    result = execute(beside(models, tmp_path, drafters["chain"], steps=2), quiet=True)
    folder = str(result.directory / "drafter")
    run, before = (
        build(recipe_for(models, tmp_path, rollout={"engine": engine(each)}), tmp_path)
        for each in (folder, drafters["chain"])
    )
    assert any(not torch.equal(weight, state(before)[name]) for name, weight in state(run).items())


def test_a_state_is_gone_on_from(models, drafters, tmp_path):
    def made(name, **learning):
        return build(beside(models, tmp_path / name, drafters["chain"], steps=4, **learning), tmp_path / name)

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir(), (tmp_path / "c").mkdir()
    whole, half = made("a"), made("b")
    train(whole)
    half.watch.read = lambda run, step, measured: setattr(run.watch, "ended_by", "enough" if step == 2 else None)
    train(half)
    rest = made("c")
    rest.restore(half.state())
    train(rest)
    for name, weight in state(whole).items():
        torch.testing.assert_close(weight, state(rest)[name], atol=0, rtol=0, msg=name)
    assert any(not torch.equal(weight, state(half)[name]) for name, weight in state(rest).items())
    kept = build(recipe_for(models, tmp_path, rollout={"engine": engine(drafters["chain"])}), tmp_path)
    with pytest.raises(opd.OpdError, match=r"set rollout\.engine\.train as it was"):
        kept.restore(half.state())
    alone = build(recipe_for(models, tmp_path), tmp_path)
    with pytest.raises(opd.OpdError, match=r"and rollout\.engine trains none"):
        alone.restore(half.state())
    with pytest.raises(opd.OpdError, match=r"rollout\.engine\.train is set, and the checkpoint holds no drafter"):
        rest.rollout.load_state_dict(alone.rollout.state_dict())


def test_mistakes_are_told_of(models, drafters, tmp_path):
    for objective, said in (
        ("reverse_kl", "says nothing of the slots of drafted blocks"),
        ({"kind": "accepted", "teacher": "a"}, "has teacher"),
        ({"kind": "rejected", "written_by": ["student"]}, "has written_by"),
    ):
        with pytest.raises(opd.OpdError, match=said):
            beside(models, tmp_path, drafters["chain"], learning={"objective": objective})


def test_its_gradient_does_not_depend_on_how_the_answers_are_cut(models, drafters, tmp_path):
    def after(micro):
        learning = {"micro": micro, "objective": {"kind": "pooled", "estimator": "whole"}, "clip_norm": None}
        run = build(beside(models, tmp_path, drafters["chain"], learning=learning), tmp_path)
        now, optimizer = run.at(0), run.rollout.writer.learner.optimizer
        request = replace(now.request(run.course.next(0, {}, None).prompts, 8, stream=0), training=True)
        made: dict[str, torch.Tensor] = {}
        optimizer.step = lambda: made.update(
            {n: p.grad.clone() for n, p in run.rollout.writer.drafter.named_parameters()}
        )
        run.rollout(request)
        run.rollout.learn(now.recipe.rollout, lambda x: x)
        return made

    whole, cut = after(64), after(3)
    assert whole
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-6, rtol=1e-4)


def test_what_is_measured_or_kept_in_a_store_teaches_it_nothing(models, drafters, tmp_path):
    run = build(beside(models, tmp_path, drafters["chain"]), tmp_path)
    before = state(run)
    rolled_out(run, run.course.next(0, {}, None).prompts, 1, 6)
    run.rollout.learn(run.at(0).recipe.rollout, lambda x: x)
    assert all(torch.equal(weight, before[name]) for name, weight in state(run).items())
    assert "engine/drafter_loss" not in run.rollout.own_signals()


def test_two_processes_hold_one_drafter(models, drafters, tmp_path):
    """Each learns from its own answers, and both take the step of all of them."""
    recipe = beside(models, tmp_path / "two", drafters["chain"], steps=2, self_test=False)
    answers = together(recipe, {})
    assert all(isinstance(answer, dict) for answer in answers), answers
    alone = execute(beside(models, tmp_path / "one", drafters["chain"], steps=2, self_test=False), quiet=True)
    one, two = (
        load_file(path / "drafter" / "model.safetensors") for path in (alone.directory, tmp_path / "two" / "run")
    )
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-4, rtol=1e-3, msg=name)
