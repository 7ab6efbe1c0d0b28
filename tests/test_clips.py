"""Clips: what is drawn when, that splits hold apart, and a small model that reads and learns them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from opd.api import execute
from opd.cli.main import app
from opd.errors import RecipeError
from opd.policies.image_text import ImageText
from opd.prompts.clips import COUNTS, FRAMES, ClipPrompts
from opd.prompts.tiles import COLOURS
from opd.recipe import parse_recipe
from opd.verifiers.temporal_grounding import interval_in


def drawn(**settings):
    return [fields for _, fields in ClipPrompts(**{"size": 8, **settings}).rows()]


def test_the_shape_that_is_asked_for_is_there_in_its_interval_alone():
    for row in drawn():
        _, colour, _ = row["prompt"].removesuffix("?").split()
        frames = row["video"]["frames"].astype(int)
        near = (abs(frames - np.array(COLOURS[colour])).sum(-1) == 0).any((1, 2))
        start, end = (round(2 * time) for time in row["interval"])
        assert 3 <= end - start <= 16
        assert near.shape == (FRAMES,)
        assert not near[:start].any()
        assert not near[end:].any()
        # Another shape may lie over it in some of its frames.
        assert near[start:end].mean() > 0.5
        assert interval_in(row["answer"]) == tuple(row["interval"])


def test_a_clip_may_be_short_and_small():
    for row in drawn(seconds=8, pixels=16, events=2):
        assert row["video"]["frames"].shape == (16, 16, 16, 3)
        assert row["duration"] == 8
        start, end = row["interval"]
        assert 1.5 <= end - start <= 4
        assert end <= 8


def test_whether_a_shape_is_shown_is_said_of_every_frame():
    for row in drawn(ask="shown", plain=True, events=2, seconds=8, pixels=16, size=4):
        assert row["prompt"].startswith("shown ")
        frames = row["video"]["frames"].astype(int)
        assert len(row["response"]) == len(frames)
        colour = COLOURS[row["prompt"].split()[1]]
        near = (abs(frames - np.array(colour)).sum(-1) == 0).any((1, 2))
        said = np.array([digit == "1" for digit in row["response"]])
        assert not near[~said].any()
        assert near[said].any()
        # The grey is the same in every clip.
        assert abs(np.median(frames) - 128) < 16


def test_splits_and_seeds_differ_and_longer_draws_begin_alike():
    names = [row["response"] + row["prompt"] for row in drawn()]
    assert [row["response"] + row["prompt"] for row in drawn(size=3)] == names[:3]
    assert names != [row["response"] + row["prompt"] for row in drawn(split="test")]
    assert names != [row["response"] + row["prompt"] for row in drawn(seed=1)]
    assert {row["prompt"].split()[1] for row in drawn(colours=["red", "teal"])} <= {"red", "teal"}
    assert {row["answer"] for row in drawn(ask="count", size=20)} == set(COUNTS)
    with pytest.raises(RecipeError, match="'mauve' is no colour of a clip"):
        parse_recipe({"prompts": {"kind": "clips", "colours": ["mauve"]}, "student": {"model": "a"}, "teacher": []})


def test_a_blank_model_learns_to_write_intervals(tmp_path):
    made = CliRunner().invoke(app, ["create-image-text-model", str(tmp_path / "model"), "--clips", "--width", "48"])
    assert made.exit_code == 0, made.output
    settings = {
        "steps": 4,
        "student": {"kind": "image_text", "model": str(tmp_path / "model"), "images": None, "videos": {"fps": 2}},
        "teacher": [],
        "prompts": {"kind": "clips", "size": 12},
        "rollout": {"kind": "data", "max_new_tokens": 12},
        "objective": "sft",
        "update": {"learning_rate": 1e-3},
        "verifier": "temporal_grounding",
        "batch": {"prompts": 4},
        "evaluation": {"held_out": 3, "max_new_tokens": 12},
        "tracking": {"trackers": []},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1},
        "output": str(tmp_path / "run"),
    }
    result = execute(parse_recipe(settings), quiet=True)
    first, *_, last = [row["train/loss"] for row in result.history if "train/loss" in row]
    assert last < first
    assert {"accuracy", "parsed", "recall_at_0.3"} <= result.before.keys()
    engine = ImageText(model=str(tmp_path / "run" / "student"), images=None, videos={"fps": 2}).engine("cpu")
    (prompt,) = ClipPrompts(size=1).load()
    context = engine.encode(prompt)
    # A stamp, two marks and four tokens a step, then the question's words and blanks.
    assert len(context) == 16 * 7 + 6
    assert context.inputs["pixel_values_videos"].shape == (16 * 16, 3 * 2 * 8 * 8)
    answer = torch.tensor(engine.tokenizer(prompt.fields["response"])["input_ids"])
    assert len(answer) == 9
    assert engine.decode(answer) == prompt.fields["response"]
