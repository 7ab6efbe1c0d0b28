"""The reproduction of Lightning OPD: its rule, what its arms differ in, and the figures that its claims are about."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.recipe import parse_recipe
from reproductions.lightning_opd_arms import (
    ABLATIONS,
    ARMS,
    BARE,
    CHOICE,
    LONG,
    MISMATCHED,
    SIBLING,
    THIRD,
    TRAINED,
    WHOLE,
    at,
    candidates,
    matched,
    student,
    taught,
)
from reproductions.lightning_opd_figure import BEHIND, BOUND, DRIFT, GAP, figure
from reproductions.lightning_opd_gap import bounds, gap, update
from reproductions.lightning_opd_jobs import compared, pooled
from reproductions.lightning_opd_models import BATCH, SIZE, STEPS, live, sft
from reproductions.lightning_opd_premise import GATES, RATES, RULE, TRIALS, WAYS, ruled, trial
from tests.test_loop import models, recipe_for  # noqa: F401


def finished(folder, **figures):
    """A stage's folder as the runner leaves it."""
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"figures": figures}))
    return folder


# -- the rule ----------------------------------------------------------------------------------------------------------


def rule(tmp_path, drifts, gains=((0.1,) * 4,) * 2):
    inputs = {}
    for seed, drift, gain in zip(TRIALS, drifts, gains, strict=True):
        names = [f"{rate:g}" for rate in RATES]
        online = dict(zip(names, (0.3 + g for g in gain), strict=True))
        stored = dict(zip(names, (0.4, 0.45, 0.42, 0.2), strict=True))
        own = dict(zip(names, drift, strict=True))
        name = trial(WAYS[0], seed)
        inputs[name] = finished(tmp_path / name, before=0.3, accuracy=online)
        name = trial(WAYS[1], seed)
        inputs[name] = finished(tmp_path / name, before=0.3, accuracy=stored, drift=own)
    return ruled(tmp_path, inputs, rates=list(RATES), seeds=list(TRIALS), limit=0.1)


def test_the_rule_takes_the_highest_rate_up_to_which_no_seed_drifts(tmp_path):
    found = rule(
        tmp_path, [(0.02, 0.05, 0.09, 0.2), (0.03, 0.06, 0.11, 0.19)], [(0.01, 0.07, 0.2, 0.3), (0, 0.04, 0, 0)]
    )
    assert found["rate"] == RATES[1]
    assert found["drift"] == {"100": 0.05, "101": 0.06}
    assert found["live_gain"] == pytest.approx({"100": 0.07, "101": 0.04})
    assert (found["best_live"], found["best_lightning"]) == (RATES[3], RATES[1])
    held = {gate.figure: gate.passes(gate.measured(RULE, found)[0]) for gate in GATES if gate.stage == RULE}
    assert held == {"drift": True, "live_gain": False}, "the worst seed decides, and it gained four points"


def test_a_rate_behind_one_that_drifts_is_not_taken_and_none_closes_the_gate(tmp_path):
    assert rule(tmp_path / "one", [(0.02, 0.12, 0.09, 0.2)] * 2)["rate"] == RATES[0]
    found = rule(tmp_path / "two", [(0.1, 0.12, 0.2, 0.2)] * 2)
    assert found["rate"] == RATES[0]
    (gate,) = (gate for gate in GATES if gate.stage == RULE and gate.figure == "drift")
    assert gate.passes(gate.measured(RULE, found)[0]), "0.1 is at most 0.1"
    found = rule(tmp_path / "three", [(0.13, 0.12, 0.2, 0.2)] * 2)
    assert not gate.passes(gate.measured(RULE, found)[0])


# -- arms --------------------------------------------------------------------------------------------------------------


def changed(block, of):
    return {key for key in block if block[key] != of[key]}


def test_an_arm_changes_what_it_is_named_after():
    plain = matched()
    parse_recipe({**plain, "seed": 0})
    assert changed(live(sft("A"), "A"), plain) == {"rollout", "teacher"}
    assert changed(ABLATIONS[THIRD], plain) == {"steps"}
    assert changed(ABLATIONS[BARE], plain) == {"objective"}
    assert changed(ABLATIONS[WHOLE], plain) == {"objective", "teacher"}
    assert changed(ABLATIONS[SIBLING], plain) == {"teacher"}
    assert changed(ABLATIONS[LONG], plain) == {"prompts", "evaluation"}
    size, held_out = ABLATIONS[LONG]["prompts"]["size"], ABLATIONS[LONG]["evaluation"]["held_out"]
    assert STEPS * BATCH / (size - held_out) == 32
    assert STEPS * BATCH / SIZE == 2
    for way in WAYS:
        assert {of for of, _ in MISMATCHED.values()} == {"A", "B"}
        _, block = MISMATCHED[taught(way, "A", "B")]
        assert changed(block, TRAINED[student(at(way, RATES[0]))].params["recipe"]) == {"teacher"}


def test_both_ways_fall_along_the_same_schedule_at_every_rate():
    for rate in RATES:
        one, other = (TRAINED[student(at(way, rate))].params for way in WAYS)
        assert one["rate"] == other["rate"] == rate
        assert one["recipe"]["update"] == other["recipe"]["update"]
        assert one["recipe"]["update"]["learning_rate"]["kind"] == "cosine"


def test_arms_of_the_rule_have_the_students_at_every_rate_to_choose_from():
    assert candidates(student(at("live", "best_live"))) == [student(at("live", rate)) for rate in RATES]
    for name in ("live", "Lightning", "live, best rate", "Lightning, best rate"):
        assert {student(at(way, rate)) for way in WAYS[: 1 + ("Lightning" in name)] for rate in RATES} <= set(
            ARMS[name].inputs
        )


# -- what jobs measure -------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(tmp_path):
    costs = {"sampled_tokens": 1.0, "teacher_tokens": 1.0}
    return {
        RULE: finished(tmp_path / "rule", rate=3e-5, best_live=1e-3, best_lightning=1e-4),
        "texts": finished(tmp_path / "texts", cpu_seconds=10.0),
        "start": finished(tmp_path / "start", test_accuracy=0.3),
        "live at 3e-05": finished(tmp_path / "live", test_accuracy=0.5, cpu_seconds=30.0, curve=[], **costs),
        "live at 0.001": finished(tmp_path / "fast", test_accuracy=0.7, cpu_seconds=30.0, **costs),
        "Lightning at 3e-05": finished(tmp_path / "stored", test_accuracy=0.45, cpu_seconds=15.0, curve=[], **costs),
    }


def test_an_arm_is_held_against_live_and_the_start(stages, tmp_path):
    own = {"start": "start", "sft": ["texts"], "choice": CHOICE, "curve": False, "seed": 0}
    found = compared(tmp_path, stages, of="Lightning at {rate}", beside="live at {rate}", **own)
    assert found["gain"] == pytest.approx(0.15)
    assert found["share_of_live_gain"] == pytest.approx(0.75)
    assert found["behind_live"] == pytest.approx(0.05)
    assert found["cost_of_live"] == 0.5
    assert found["cost_of_live_with_sft"] == 25 / 40
    assert "curve" not in found
    online = compared(tmp_path, stages, of="live at {rate}", beside="live at {rate}", **own | {"curve": True})
    assert (online["share_of_live_gain"], online["cost_of_live_with_sft"], online["curve"]) == (1.0, 1.0, [])
    best = compared(tmp_path, stages, of="Lightning at {rate}", beside="live at {best_live}", **own)
    assert best["behind_live"] == pytest.approx(0.25)


def test_pooled_students_are_averaged_and_lose_against_others(stages, tmp_path):
    found = pooled(
        tmp_path, stages, of=["Lightning at {rate}"], against=["live at {rate}", "live at 0.001"], choice=CHOICE, seed=0
    )
    assert found["test_accuracy"] == 0.45
    assert found["lost"] == pytest.approx(0.15)
    both = pooled(tmp_path, stages, of=["live at {rate}", "live at 0.001"], choice=CHOICE, seed=0)
    assert both["test_accuracy"] == pytest.approx(0.6)
    assert "curve" not in both


# -- theorem 3.5 -------------------------------------------------------------------------------------------------------


def test_the_gap_is_a_covariance_below_its_bound():
    g = torch.Generator().manual_seed(0)
    updates, ratios = torch.randn(50, 7, generator=g), torch.rand(50, generator=g) + 0.5
    advantages = updates.norm(dim=1) * (1 + torch.rand(50, generator=g))
    found = bounds(updates, advantages, ratios)
    expected = torch.stack([torch.cov(torch.stack([ratios, each]), correction=0)[0, 1] for each in updates.T])
    assert found["gradient_gap"] == pytest.approx(float(expected.norm()), rel=1e-5)
    assert 0 < found["gradient_gap"] <= found["gradient_bound"]
    assert bounds(updates, advantages, torch.ones(50))["gradient_gap"] == 0.0


def test_the_gap_of_a_student_that_has_not_moved_is_zero(models, tmp_path):  # noqa: F811
    recipe = recipe_for(models, tmp_path, rollout={"max_new_tokens": 10}, batch={"prompts": 8, "group": 1})
    store = sample(recipe, tmp_path / "store", quiet=True)
    score(recipe, store.path, name="right", quiet=True)
    found = gap(models[0], recipe.dump(), store.path, "right", seed=0)
    # The sampler's copy of the weights may be a shorter one.
    assert found["chi2"] == pytest.approx(0.0, abs=2e-3)
    assert found["gradient_gap"] < 0.1 * found["gradient_size"]
    language = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32).eval()
    row, covered = store.row(0), store.header.covered()
    left_out = torch.tensor([i in covered.excluded for i in range(covered.size)])
    then = row.behaviour - 0.1
    log_p = row.behaviour + 0.5
    moved, size, ratio = update(language, left_out, row.context, row.actions, then, log_p)
    assert float(size) == pytest.approx(0.5 * len(row.actions), rel=2e-2)
    assert float(ratio.log()) == pytest.approx(0.1 * len(row.actions), rel=5e-2)
    twice, _, _ = update(language, left_out, row.context, row.actions, then, row.behaviour + 1.0)
    torch.testing.assert_close(twice, 2 * moved, rtol=0.1, atol=0.02)


def test_the_figure_has_a_point_for_each_student_and_the_limit():
    arms = {
        name: {DRIFT: [0.05, x], BEHIND: [0.01, y], GAP: [1.0, 0.0], BOUND: [50.0, 400.0]}
        for name, x, y in (("slow", 0.1, 0.0), ("fast", 0.4, 0.12))
    }
    drawn = ElementTree.fromstring(figure(arms, ["slow", "fast"], 0.1))
    space = "{http://www.w3.org/2000/svg}"
    left, right = drawn.findall(f"{space}g")
    points = [(float(c.get("cx")), float(c.get("cy"))) for c in left.findall(f"{space}circle")]
    assert len(points) == 4
    assert len(right.findall(f"{space}circle")) == 8
    assert points[3] == (300.0, 0.0), "the furthest and the highest"
    assert points[1][1] == 220.0
    (limit,) = (p.get("d") for p in left.findall(f"{space}path") if p.get("class") == "limit")
    assert limit == "M75.0 0V220"
