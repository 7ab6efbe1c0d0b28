"""Schedules as data: values at steps, bounds, what a recipe accepts and prints, and what training does with them."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field, ValidationError

import opd
from opd.api import execute
from opd.choice import Settings
from opd.errors import RunError
from opd.language.rollout import LanguageRollout
from opd.recipe import parse_recipe
from opd.schedules import OverSteps
from tests.conftest import rolled_out
from tests.test_loop import build, models, recipe_for  # noqa: F401


class Inner(Settings):
    share: Annotated[float, OverSteps(ge=0, le=1)] = 0.5


class Block(Settings):
    rate: Annotated[float, OverSteps(gt=0)] = 1e-3
    length: Annotated[int, OverSteps(ge=1)] = 8
    inner: Inner = Inner()
    parts: list[Inner] = Field([])


def test_points_are_joined_by_straight_lines_and_hold_steps_up():
    block = Block(rate=[[10, 1.0], [20, 3.0]], length={"kind": "hold", "points": [[0, 4], [5, 9]]})
    assert [block.at(s, 100).rate for s in (0, 10, 15, 20, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert [block.at(s, 100).length for s in (0, 4, 5, 99)] == [4, 4, 9, 9]
    assert isinstance(block.at(7, 100).length, int)


def test_named_schedules_reach_their_ends_and_warm_up_from_the_first_step():
    cosine = Block(rate={"kind": "cosine", "start": 1.0, "end": 0.5, "warmup": 2})
    values = [cosine.at(s, 12).rate for s in range(13)]
    assert values[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert values[7] == pytest.approx(0.75)
    assert values[12] == pytest.approx(0.5)
    linear = Block(rate={"kind": "linear", "start": 1.0, "end": 0.2, "steps": 4})
    assert [linear.at(s, 100).rate for s in (0, 2, 4, 50)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    constant = Block(rate={"kind": "constant", "start": 2.0, "warmup": 1})
    assert [constant.at(s, 9).rate for s in (0, 1, 8)] == [1.0, 2.0, 2.0]


def test_schedules_are_found_and_put_into_nested_blocks():
    block = Block(inner={"share": [[0, 0], [10, 1]]}, parts=[{}, {"share": [[0, 1], [4, 0]]}])
    assert set(block.scheduled()) == {"inner.share", "parts.1.share"}
    now = block.at(2, 10)
    assert (now.inner.share, now.parts[0].share, now.parts[1].share) == (0.2, 0.5, 0.5)
    assert now.scheduled() == {}
    plain = Block()
    assert plain.at(3, 10) is plain


@pytest.mark.parametrize(
    "value",
    [[[0, 1e-3], [5, 0]], {"kind": "linear", "start": 1.0, "end": -1}, [[5, 1], [2, 1]], {"kind": "step"}, [[0]], "x"],
)
def test_bounds_hold_for_every_step_and_shapes_are_checked(value):
    with pytest.raises(ValidationError):
        Block(rate=value)


def test_a_schedule_survives_the_recipe_that_is_written_into_the_run(models, tmp_path):  # noqa: F811
    recipe = recipe_for(models, tmp_path, update={"learning_rate": {"kind": "cosine", "start": 1e-2, "warmup": 1}})
    again = parse_recipe(recipe.dump())
    assert again == recipe
    assert again.dump()["update"]["learning_rate"] == {"kind": "cosine", "start": 0.01, "warmup": 1}


def test_training_follows_schedules_of_rate_temperature_and_objective(models, tmp_path):  # noqa: F811
    recipe = recipe_for(
        models,
        tmp_path,
        steps=3,
        temperature=[[0, 1.0], [2, 0.5]],
        update={"learning_rate": [[0, 1e-2], [2, 0.0]]},
        objective={"kind": "mixture", "reverse_weight": [[0, 0.0], [2, 1.0]]},
        rollout={"max_new_tokens": {"kind": "hold", "points": [[0, 4], [1, 6]]}},
        end_tokens=[1],
    )
    steps = [r for r in execute(recipe, quiet=True).history if "train/loss" in r]
    assert [r["train/learning_rate"] for r in steps] == pytest.approx([1e-2, 5e-3, 0.0])
    assert [r["train/schedule/temperature"] for r in steps] == [1.0, 0.75, 0.5]
    assert [r["train/schedule/objective.0.reverse_weight"] for r in steps] == [0.0, 0.5, 1.0]
    assert 2 < steps[0]["train/length"] <= 4 < steps[1]["train/length"] <= 6
    # The sampler and the loss follow the same temperature: their log-probabilities still agree.
    assert all(r["train/rollout_gap"] < 1e-4 for r in steps)


def test_held_out_samples_follow_the_schedules_that_training_follows(models, tmp_path, monkeypatch):  # noqa: F811
    """Temperature, cuts and length of the held-out sampler are the step's, and `exact` says so of the rollout."""
    seen, evaluate = [], opd.monitor.evaluate

    def looking(run):
        now = run.at(max(0, run.step - 1))
        sampler = run.sampler(now)
        seen.append((run.step, sampler.context.temperature, sampler.settings.top_p, now.recipe.rollout.budget))
        return evaluate(run)

    monkeypatch.setattr("opd.monitor.evaluate", looking)
    recipe = recipe_for(
        models,
        tmp_path,
        temperature=[[0, 1.0], [2, 0.25]],
        rollout={
            "top_p": {"kind": "hold", "points": [[0, 1.0], [1, 0.9]]},
            "max_new_tokens": {"kind": "hold", "points": [[0, 3], [2, 5]]},
        },
        evaluation={"every": 1},
    )
    result = execute(recipe, quiet=True)
    # Before training, after each step but the last, and at the end.
    assert seen == [(0, 1.0, 1.0, 3), (1, 1.0, 1.0, 3), (2, 0.625, 0.9, 3), (3, 0.25, 0.9, 5)]
    assert ["train/rollout_gap" in r for r in result.history if "train/loss" in r] == [True, False, False]
    lengths = [r["held_out/length"] for r in result.history if "held_out/length" in r]
    assert max(lengths[:3]) <= 3 < lengths[3]
    assert execute(recipe, quiet=True, resume=True).after == result.after, "a finished run measures as it did"
    assert seen[-1] == (3, 0.25, 0.9, 5)


def test_a_schedule_reaches_the_sources_of_a_switch_in_a_mixture(models, tmp_path, monkeypatch):  # noqa: F811
    top_p = {"kind": "hold", "points": [[0, 1.0], [1, 0.5]]}
    switch = {"kind": "switch", "first": {"kind": "teacher"}, "then": {"kind": "student", "top_p": top_p}}
    rollout = {"kind": "mixture", "first": switch, "second": {"kind": "student", "top_k": [[0, 0], [2, 8]]}}
    recipe = recipe_for(models, tmp_path, temperature=[[0, 1.0], [2, 0.5]])
    run, seen = build(parse_recipe({**recipe.dump(), "rollout": rollout}), tmp_path), []

    def watched(source, request):
        seen.append((source.author, request.settings.top_p, request.settings.top_k, request.context.temperature))
        return sample(source, request)

    sample = LanguageRollout.__call__
    monkeypatch.setattr(LanguageRollout, "__call__", watched)
    rolled_out(run, run.course.next(0, {}, None).prompts, 1, 20)
    assert set(seen) == {("teacher", 1.0, 0, 1.0), ("student", 1.0, 0, 1.0)}
    seen.clear()
    run.rollout(run.at(2).request(run.course.next(0, {}, None).prompts, 20, stream=0))
    assert set(seen) == {("teacher", 1.0, 0, 0.5), ("student", 0.5, 0, 0.5), ("student", 1.0, 8, 0.5)}
    inner, student = run.at(2).recipe.rollout.parts
    assert not run.rollout.sources[1].exact(student)
    assert not run.rollout.sources[0].sources[1].exact(inner.then)


def test_a_student_is_asked_with_a_steps_temperature_where_that_is_scheduled(models, tmp_path):  # noqa: F811
    run = build(recipe_for(models, tmp_path, temperature=[[0, 1.0], [2, 0.5]]), tmp_path)
    made = rolled_out(run, run.course.next(0, {}, None).prompts, 1, 6)
    with pytest.raises(RunError, match="temperature follows a schedule"):
        run.student(made)
    assert [run.student(made, run.at(step).context).head.temperature for step in (0, 2)] == [1.0, 0.5]
