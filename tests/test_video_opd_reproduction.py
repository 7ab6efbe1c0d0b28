"""The reproduction of Video-OPD: its premise, its arms, its time-matched arm, and the spread of its gradients."""

from __future__ import annotations

import json

import pytest

from opd.verifiers.temporal_grounding import Interval
from reproductions import video_opd
from reproductions.video_opd import (
    ARMS,
    DATA,
    GRPO,
    OPD,
    PLAIN,
    SHARE,
    STEPS,
    TUNED,
    distilled,
    figured,
    reproduction,
    spread,
)
from reproductions.video_opd_models import KNOWN, SIZES, UNKNOWN, clips
from reproductions.video_opd_models import blank as new_model
from reproductions.video_opd_premise import blind, measured, of_colours, verdict


def test_the_premise_wants_a_teacher_that_knows_some_colours_and_a_middling_start():
    figures = {"known": 0.8, "unknown": 0.3, "sees": 0.1, "headroom": 0.2, "parsed": 0.99, "count": 0.6}
    assert verdict(figures)[0]
    for name, worse in (
        ("known", 0.7),
        ("unknown", 0.5),
        ("sees", 0.03),
        ("headroom", 0.1),
        ("parsed", 0.9),
        ("count", 0.4),
    ):
        holds, lines = verdict({**figures, name: worse})
        assert not holds
        assert sum(line.endswith("NO") for line in lines) == 1
    values = {f"a {KNOWN[0]}": 1.0, f"b {UNKNOWN[0]}": 0.0}
    assert of_colours(values, True) == {f"a {KNOWN[0]}": 1.0}
    assert of_colours(values, False) == {f"b {UNKNOWN[0]}": 0.0}


def test_a_blind_answer_is_the_one_interval_that_overlaps_most():
    assert blind([Interval(1.0, 3.0)]) == 1.0
    assert blind([Interval(0.0, 2.0), Interval(2.0, 4.0)]) == 0.5
    assert blind([Interval(1.0, 3.0), Interval(1.5, 3.5), Interval(0.5, 2.5)]) == pytest.approx((1 + 0.6 + 0.6) / 3)


def test_arms_change_what_they_say_and_nothing_else():
    plain = distilled({})
    assert "curriculum" not in plain
    for name, changes in ARMS.items():
        block = distilled(changes)
        changed = {key for key in block if block[key] != plain.get(key)}
        assert changed == set(changes), name
    assert distilled(ARMS[GRPO])["batch"]["group"] == 8
    assert distilled(ARMS["OP-RKD"])["rollout"]["kind"] == DATA["rollout"]["kind"]
    assert ARMS[OPD]["curriculum"]["size"] == STEPS * plain["batch"]["prompts"]
    assert set(TUNED) <= set(ARMS)
    assert len(reproduction.headline) == 8


def test_seconds_are_scaled_for_the_claim_about_an_update(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({"figures": {"seconds_per_update": 2.0, "test_iou": 0.5}}))
    found = figured(tmp_path, {"a": tmp_path}, of="a", seed=0, share=SHARE)
    assert found == {"seconds_per_update": 0.8, "test_iou": 0.5}


def test_an_arm_in_another_s_time_takes_as_many_steps(tmp_path, monkeypatch):
    given = {"one": {"cpu_seconds": 30.0}, "other": {"seconds_per_update": 4.0}, "rate": {"rate": 1e-3}}
    monkeypatch.setattr(video_opd, "figures_of", lambda place: given[place])
    monkeypatch.setattr(video_opd, "train", lambda *a, recipe, seed: {"cpu_seconds": 2.0 * recipe["steps"]})
    monkeypatch.setattr(video_opd, "tested", lambda *a: {})
    places = {name: name for name in given}
    found = video_opd.trained(
        tmp_path, places, recipe=distilled({}), size=4, rate="rate", seed=0, as_long=["one", "other"]
    )
    assert found["steps"] == 8
    assert found["seconds_per_update"] == 2.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        (folder / name).mkdir()
        new_model(folder / name, {}, sizes=SIZES, seed=seed)
    return folder


def test_a_measurement_keeps_every_overlap_and_every_count(models, tmp_path):
    found = measured(tmp_path, models / "student" / "model", size=4, split="validation", seed=0)
    assert {name: len(values) for name, values in found.items()} == {"iou": 4, "count": 1, "blind": 1, "parsed": 1}
    assert {name.split()[-1] for name in found["iou"]} <= {*KNOWN, *UNKNOWN}


def test_the_spread_of_gradients_is_a_share_of_their_mean(models, tmp_path):
    own = {
        "prompts": [clips(4, "train", 4)],
        "batch": {"prompts": 2},
        "student": {"model": str(models / "student" / "model")},
        "teacher": [{**distilled({})["teacher"][0], "model": str(models / "teacher" / "model")}],
        "evaluation": {"prompts": [clips(2, "validation")], "every": 0},
    }
    found = spread(tmp_path, {}, recipe=distilled(own), resamples=3, seed=0)
    assert found["gradient_variance"] > 0
    same = {**own, "rollout": {"kind": "data"}, "objective": ["forward_kl"]}
    still = spread(tmp_path / "b", {}, recipe=distilled(same), resamples=2, seed=0)
    assert still["gradient_variance"] == pytest.approx(0, abs=1e-6)
    assert PLAIN in ARMS
