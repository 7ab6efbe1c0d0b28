"""What is told to do about a mistake is what helps: the file and the key it is in, and a fix that is taken."""

from __future__ import annotations

import json
import sys

import pytest

import opd
from opd.assembly import load_data
from opd.cli.main import main
from opd.errors import DataError, RecipeError
from opd.failures import skipped_rows
from opd.recipe import load_recipe, parse_recipe

BLOCKS = {"student": "org/small", "teacher": "org/large", "evaluation": {"held_out": 1}}


def on(path, **changes):
    return parse_recipe({**BLOCKS, "prompts": str(path), **changes})


def rows_in(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_an_empty_file_is_named_with_its_key(tmp_path):
    empty, full = rows_in(tmp_path / "empty.jsonl"), rows_in(tmp_path / "full.jsonl", {"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(DataError, match=r"^prompts: .*empty\.jsonl holds no rows; name a source that holds at least"):
        load_data(on(empty))
    with pytest.raises(DataError, match=r"^evaluation\.prompts: .*empty\.jsonl holds no rows"):
        load_data(on(full, evaluation={"prompts": str(empty)}))


TURNS = [{"from": "human", "value": "hi"}]


def test_turns_in_another_form_are_told_and_not_sent_to_a_key_that_refuses_them(tmp_path):
    path = rows_in(tmp_path / "sharegpt.jsonl", *({"conversations": TURNS} for _ in range(2)))
    with pytest.raises(DataError) as found:
        load_data(on(path))
    assert "column 'conversations' holds turns with 'from' and 'value' (ShareGPT); write each as" in str(found.value)
    assert "prompts.column" not in str(found.value)
    mended = [{"role": "user", "content": turn["value"]} for turn in TURNS]
    assert len(load_data(on(rows_in(path, *({"messages": mended} for _ in range(2)))))[0]) == 1, "as it says"


@pytest.mark.parametrize("wrong", ['{"prompt": "a"', '{"other": "a"}', '{"prompt": " "}', '{"prompt": "b", "id": "b"}'])
def test_rows_that_cannot_be_used_may_be_left_out_and_that_is_said_where_it_helps(tmp_path, wrong):
    good = [{"prompt": text, "id": text} for text in "bcd"]
    path = rows_in(tmp_path / "rows.jsonl", *good, wrong)
    with pytest.raises(DataError, match=r"rows\.jsonl:4.*; or leave the row out with skip_bad_prompts=true$"):
        load_data(on(path))
    with pytest.raises(DataError, match=r"rows\.jsonl:4.*; or leave all 2 such rows out with skip_bad_prompts=true$"):
        load_data(on(rows_in(path, *good, wrong, wrong)))
    bad = []
    training, held_out = load_data(on(path, skip_bad_prompts=True), bad)
    assert len(training) + len(held_out) == 3
    assert bad
    assert not any("skip_bad_prompts" in line for line in skipped_rows(bad)), "it is skipped already"
    with pytest.raises(DataError) as found:
        load_data(on(rows_in(path, '{"other": "a"}', '{"other": "b"}')))
    assert "skip_bad_prompts" not in str(found.value), "nothing would be left"


def test_no_prompts_held_out_is_told_with_what_to_do():
    with pytest.raises(RecipeError, match=r"^recipe: evaluation\.held_out is 0: .*hold out 1 or more, or name a set"):
        parse_recipe({**BLOCKS, "prompts": "a.jsonl", "evaluation": {"held_out": 0}})


def test_prompts_that_are_neither_texts_nor_rows_are_told_as_that():
    with pytest.raises(RecipeError) as found:
        opd.distill("org/small", "org/large", ["a", 2, 3])
    assert "item 1 is 2, and a prompt is a text or a row {column: value, ...}" in str(found.value)
    assert "prompts.str" not in str(found.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps=many", "override 'steps=many': steps is 'many': it takes a whole number"),
        ("update.lr=1", "override 'update.lr=1': unknown key 'update.lr'"),
        ("teacher.0.device=gpu", "override 'teacher.0.device=gpu': teacher"),
    ],
)
def test_a_mistake_in_an_override_is_told_with_the_override(tmp_path, override, told):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({**BLOCKS, "teacher": [{"model": "org/large"}], "prompts": "a.jsonl"}))
    with pytest.raises(RecipeError) as found:
        load_recipe(str(file), ["seed=1", override])
    assert str(found.value).startswith(told)
    assert "mine.yaml" not in str(found.value)
    file.write_text(json.dumps({**BLOCKS, "prompts": "a.jsonl", "steps": 0}))
    with pytest.raises(RecipeError, match=r"mine\.yaml: steps is 0"):
        load_recipe(str(file), ["seed=1"])


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_that_holds_no_run_is_told_as_that(tmp_path, monkeypatch, capsys, there):
    if there:
        (tmp_path / "nothing").mkdir()
    monkeypatch.setattr(sys, "argv", ["opd", "eval", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        main()
    assert "or the directory of a run, in which its recipe.yaml lies" in capsys.readouterr().err


def test_a_run_that_a_function_judged_is_told_how_to_be_measured(tmp_path):
    file = tmp_path / "recipe.yaml"
    judged = {"kind": "function", "call": "(shortness passed from Python)"}
    file.write_text(json.dumps({**BLOCKS, "prompts": "a.jsonl", "verifier": judged}))
    with pytest.raises(RecipeError, match="verifier=exact_match measures a run whose verifier was a function"):
        load_recipe(str(file))
    assert load_recipe(str(file), ["verifier=exact_match"]).verifier is not None, "as it says"
