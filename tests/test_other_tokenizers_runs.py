"""Runs whose teachers have a tokenizer of their own: what they log, and what is refused before them."""

from __future__ import annotations

import json

import pytest

import opd
from opd.errors import IncompatibleError, RecipeError
from opd.recipe import parse_recipe
from tests.conftest import tiny_model
from tests.other_tokenizers import byte_level, characters, sentencepiece
from tests.tiny import saved, short_run

PROMPTS = ["the quick brown fox", "She said: hello", "what is 3.50 + 12?", "the dog", "hello", "12", "x + 1", "fox"]
BOTH = [{"kind": "reverse_kl"}, {"kind": "reverse_kl_sampled", "spans": "several"}]


def model(folder, tokenizer, seed=0, width=32):
    made = tiny_model(vocabulary=len(tokenizer.get_vocab()), seed=seed, width=width, initializer_range=0.1)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    return saved(folder, made, tokenizer)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": model(folder / "student", characters()),
        "bytes": model(folder / "bytes", byte_level(), seed=1, width=48),
        "pieces": model(folder / "pieces", sentencepiece(), seed=2),
    }


def teacher(models, name, **more):
    return {"model": models[name], "template": "plain", "tokenizer": "own", **more}


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_what_was_compared_and_the_report_shows_it(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    short_run(tmp_path, student, teacher(models, "bytes"), PROMPTS, objective=BOTH)
    steps = [record for record in records(tmp_path) if "train/loss" in record]
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["train/alignment/single_bytes"] < 1
        assert 0 < step["train/alignment/span_bytes"] < 1
        assert 0 < step["train/alignment/common_mass"] < 1
        assert step["train/alignment/left_out"] == 0
    assert any("held_out/reverse_kl_sampled" in record for record in records(tmp_path))
    page = (tmp_path / "report.html").read_text() if (tmp_path / "report.html").exists() else ""
    assert not page or "another tokenizer: one token on both sides" in page


def test_several_teachers_and_routes_of_several_tokenizers(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    rows = [{"prompt": text, "task": "a" if i % 2 else "b"} for i, text in enumerate(PROMPTS)]
    routed = {
        "kind": "routed",
        "name": "experts",
        "by": "task",
        "routes": {"a": teacher(models, "bytes"), "b": teacher(models, "pieces")},
    }
    teachers = [routed, teacher(models, "pieces", name="anchor", weight=0.5)]
    short_run(tmp_path, student, teachers, rows, objective={"kind": "reverse_kl"})
    step = next(record for record in records(tmp_path) if "train/loss" in record)
    assert {"train/alignment/single_bytes@a", "train/alignment/single_bytes@anchor"} <= step.keys()


def test_another_tokenizer_is_refused_with_the_setting_that_takes_it(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    with pytest.raises(IncompatibleError, match="another tokenizer than the student.*Set tokenizer: own"):
        short_run(tmp_path, student, {**teacher(models, "bytes"), "tokenizer": None}, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": {"kind": "reverse_kl_candidates"}}, "answers 'aligned'"),
        ({"objective": {"kind": "lightning"}}, "take reverse_kl_sampled"),
        ({"objective": {"kind": "reverse_kl", "top_k": 500}}, "ids in common"),
        ({"shaping": {"kind": "log_ratio_gate", "limit": 1.0}}, "answers 'aligned'"),
        ({"rollout": {"max_new_tokens": 8, "watch": {"kind": "drift"}}}, "rollout.watch"),
    ],
)
def test_what_cannot_be_computed_from_spans_is_refused(models, tmp_path, changes, told):
    student = {"model": models["student"], "template": "plain"}
    with pytest.raises(IncompatibleError, match=told):
        short_run(tmp_path, student, teacher(models, "bytes"), PROMPTS, **changes)


def test_own_is_said_of_teachers_alone():
    with pytest.raises(RecipeError, match="said of a teacher"):
        parse_recipe({"student": {"model": "a/b", "tokenizer": "own"}, "teacher": {"model": "a/c"}, "prompts": ["x"]}, "r")


def test_own_with_a_place(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    placed = teacher(models, "bytes", tokenizer=f"own:{models['bytes']}")
    found = short_run(tmp_path, student, placed, PROMPTS)
    assert found is not None
    assert opd.__version__
