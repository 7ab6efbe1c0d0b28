"""Every choice is in the table of what combines, its page is what the results say, and a few pairs do what it says."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import pages
from benchmarks.combinations.page import generated
from benchmarks.combinations.parts import Part
from benchmarks.combinations.table import GOOD, kinds_of, known_kinds, label, load, measured, save, without_choice
from benchmarks.combinations.tasks import tasks
from benchmarks.combinations.trying import Trials
from opd.errors import RecipeError, RunError
from opd.objectives.grpo import GRPO
from opd.recipe import parse_recipe
from opd.shaping.uniform import UniformShaper

RESULTS, _ = load()
SAMPLE = {
    "causal_lm": [
        ("rollout.mixture", "objective.jensen_shannon"),
        ("rollout.teacher", "objective.grpo"),
        ("objective.cross_entropy", ""),
        ("shaping.drift", "objective.sft"),
        ("teacher.routed", "objective.grpo"),
        ("update.differentially_private", "curriculum.window"),
        ("curriculum.focusing", "teacher.served (sampled)"),
    ],
    "action_tokens": [("rollout.demonstrations", "objective.hard_ce"), ("shaping.outcome_balance", "objective.grpo")],
}
"""Pairs that are tried again, by kind of student."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with tasks(tmp_path_factory.mktemp("tasks"), list(SAMPLE)) as found:
        yield {task.name: task for task in found}


@pytest.fixture(scope="module")
def acting(made):
    return made["action_tokens"]


def part(task, name):
    return next(each for each in task.parts if label(each) == name)


def test_every_choice_was_tried():
    """A new one: `python -m benchmarks.combinations`, after a `Part` of it in benchmarks/combinations/tasks.py."""
    assert not known_kinds() - kinds_of(RESULTS)


def test_every_kind_of_student_has_a_choice_that_runs_on_every_axis():
    for result in RESULTS:
        assert not without_choice(result), result.task


def test_a_task_that_is_refused_itself_is_no_table(acting):
    broken = dataclasses.replace(acting, base={**acting.base, "objective": {"kind": "gaussian_kl"}})
    with pytest.raises(RunError, match="action_tokens has no choice that runs on the axes"):
        measured(broken, Trials(), None, lambda result, found: None)


def test_every_pair_works_or_is_refused_with_a_reason():
    for result in RESULTS:
        for found in (*result.singles, *result.pairs):
            assert found.verdict in GOOD, found
            assert bool(found.reason) == (found.verdict != "works"), found


def test_every_pair_is_there(made):
    for result in RESULTS:
        names = [f"{axis}.{name}" for axis, of in result.choices.items() for name in of]
        assert sorted(names) == sorted(found.a for found in result.singles)
        task = made.get(result.task)
        if task is not None:
            assert sorted(map(label, task.parts)) == sorted(names)
            fitting = [each for each in task.parts if label(each) not in result.refused]
            assert [(label(a), label(b)) for a, b in task.couples(fitting)] == [(f.a, f.b) for f in result.pairs]


def test_the_page_is_what_the_results_say():
    text = (pages.ROOT / "docs" / "combinations.md").read_text(encoding="utf-8")
    assert text.split(pages.MARK)[1].strip() == generated(RESULTS).strip()


def test_the_file_is_read_as_it_was_written(tmp_path):
    save(RESULTS, {"cpu_seconds": 1}, tmp_path / "again.json")
    assert load(tmp_path / "again.json") == (RESULTS, {"command": load()[1]["command"], "cpu_seconds": 1})


@pytest.mark.parametrize(("name", "a", "b"), [(name, *pair) for name, pairs in SAMPLE.items() for pair in pairs])
def test_a_few_pairs_do_what_the_results_say(made, name, a, b):
    task = made[name]
    outcome = Trials().of(task, *(part(task, each) for each in (a, b) if each))
    result = next(result for result in RESULTS if result.task == name)
    told = next(found for found in (*result.singles, *result.pairs) if (found.a, found.b) == (a, b))
    assert (outcome.verdict, outcome.reason) == (told.verdict, told.reason)


def test_what_is_ignored_and_what_goes_wrong_is_seen(acting, monkeypatch):
    balance, simulator = part(acting, "shaping.outcome_balance"), part(acting, "rollout.simulator")
    shaped = "opd.shaping.outcome_balance.OutcomeBalanceShaper.__call__"
    monkeypatch.setattr(shaped, lambda self, student, targets, micro, settings: UniformShaper()(None, [], micro, None))
    assert Trials().of(acting, balance, simulator).verdict == "alone"

    def fails(*given, **named):
        raise KeyError("a fault")

    monkeypatch.setattr(shaped, fails)
    outcome = Trials().of(acting, balance, simulator)
    assert outcome.verdict == "broken"
    assert "KeyError: 'a fault'" in outcome.reason


def test_parts_keep_their_own_values_and_shapings_stand_beside_each_other(acting):
    a = Part("objective", "sft", {"kind": "sft"}, {"shaping": {"kind": "drift"}, "rollout": {"decisions": 2}})
    b = Part("shaping", "uniform", {"kind": "uniform"})
    data = acting.recipe(a, b)
    assert data["shaping"] == [{"kind": "uniform"}, {"kind": "drift"}]
    assert data["rollout"] == {"kind": "simulator", "decisions": 2}
    assert acting.recipe(a, b, instead=Part("objective", "grpo", {"kind": "grpo"}))["objective"] == {"kind": "grpo"}


JUDGED = {
    "student": {"model": "org/small"},
    "teacher": {"model": "org/large"},
    "prompts": {"kind": "inline", "prompts": ["a"]},
    "batch": {"group": 2},
    "verifier": "exact_match",
}


@pytest.mark.parametrize(
    ("shaping", "told"),
    [
        ("drift", "'drift' weighs positions, and objective 'grpo' takes no weights.*set its weigh to false"),
        ("outcome_balance", "'outcome_balance' weighs positions.*set its denominator to kept"),
        ("truncated_importance", "'truncated_importance' weighs positions.*leave it out"),
    ],
)
def test_a_shaping_that_weighs_no_objective_is_refused(shaping, told):
    with pytest.raises(RecipeError, match=told):
        parse_recipe({**JUDGED, "shaping": shaping, "objective": "grpo"})
    parse_recipe({**JUDGED, "shaping": shaping, "objective": ["grpo", "reverse_kl"]})


@pytest.mark.parametrize(
    "shaping", ["uniform", {"kind": "drift", "weigh": False}, {"kind": "outcome_balance", "denominator": "kept"}]
)
def test_one_that_weighs_nothing_goes_with_any_objective(shaping):
    assert isinstance(parse_recipe({**JUDGED, "shaping": shaping, "objective": "grpo"}).objective[0], GRPO)


DRAFTED = {"student": {"kind": "draft", "target": {"model": "org/large"}, "drafter": {"kind": "chain"}}}
DRAWN = {
    "student": {"kind": "flow_transformer", "model": "org/flow"},
    "teacher": {"kind": "flow", "model": "org/other"},
}
ACTED = {"student": {"kind": "action_tokens", "model": "org/policy"}, "teacher": "scripted"}
FOCUSING = {"kind": "focusing", "size": 2}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {**ACTED, "verifier": None, "rollout": "simulator", "objective": "accepted"},
            "objective 'accepted' is for language models.*objective choices that fit: .*grpo",
        ),
        (
            {**DRAWN, "verifier": None, "rollout": "sde", "objective": "cross_entropy"},
            "objective 'cross_entropy' is for language models",
        ),
        (
            {**DRAWN, "objective": "gaussian_kl", "rollout": "sde", "verifier": "drawing", "curriculum": FOCUSING},
            "rollout 'teacher' in curriculum is for language models .* rollout choices that fit: .*sde",
        ),
        (
            {
                **DRAFTED,
                "teacher": {"kind": "target"},
                "rollout": "speculative",
                "objective": "pooled",
                "curriculum": FOCUSING,
            },
            "rollout 'teacher' in curriculum beside student.kind draft: .* take speculative",
        ),
    ],
)
def test_what_no_student_of_this_kind_can_have_is_refused_when_the_recipe_is_read(changes, told):
    with pytest.raises(RecipeError, match=told):
        parse_recipe({**JUDGED, **changes})
