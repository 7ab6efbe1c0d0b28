"""A name in the place of a block: models and prompts in a word, in YAML, on the command line and from Python."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from opd.api import _prompt_block
from opd.errors import RecipeError
from opd.prompts import Prompts
from opd.prompts.dataset import DatasetPrompts
from opd.prompts.file import FilePrompts
from opd.recipe import load_recipe, parse_recipe
from opd.teachers.self_teacher import SelfTeacher

WORDS = {"student": "org/small", "teacher": "org/large", "prompts": "questions.jsonl"}


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_models_and_prompts_are_named_in_a_word(tmp_path):
    recipe = load_recipe(written(tmp_path, "\n".join(f"{key}: {value}" for key, value in WORDS.items())))
    assert (recipe.student.model, recipe.teacher[0].model) == ("org/small", "org/large")
    assert isinstance(recipe.prompts[0], FilePrompts)
    assert recipe.prompts[0].path == "questions.jsonl"
    several = parse_recipe(WORDS | {"teacher": ["self", "package:llm"], "prompts": ["a.csv", "org/questions"]})
    assert isinstance(several.teacher[0], SelfTeacher)
    assert several.teacher[1].model == "package:llm"
    assert [type(each) for each in several.prompts] == [FilePrompts, DatasetPrompts]


def test_keys_are_set_beside_a_name(tmp_path):
    path = written(tmp_path, "student: org/small\nteacher: [org/large, self]\nprompts: [a.jsonl, {path: b.jsonl}]")
    changes = ["student.lora.rank=4", "teacher.0.dtype=float32", "teacher.1.mode=frozen", "prompts.0.column=question"]
    recipe = load_recipe(path, [*changes, "evaluation.prompts=held_out.txt"])
    assert (recipe.student.model, recipe.student.lora.rank) == ("org/small", 4)
    assert (recipe.teacher[0].model, recipe.teacher[0].dtype) == ("org/large", "float32")
    assert (recipe.teacher[1].kind, recipe.teacher[1].mode) == ("self", "frozen")
    assert [(each.path, each.column) for each in recipe.prompts] == [("a.jsonl", "question"), ("b.jsonl", "prompt")]
    assert recipe.evaluation.prompts[0].path == "held_out.txt"
    named = load_recipe(path, ["prompts=c.parquet", "teacher=other/large", "student=other/small"])
    assert (named.prompts[0].path, named.teacher[0].model, named.student.model) == (
        "c.parquet",
        "other/large",
        "other/small",
    )


def test_a_kind_is_a_kind_and_a_folder_of_that_name_has_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    assert parse_recipe(WORDS | {"teacher": "self"}).teacher[0].kind == "self"
    assert parse_recipe(WORDS | {"teacher": "./self"}).teacher[0].model == "./self"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("teacher", "slef", r"teacher.kind is 'slef' \(did you mean 'self'\?\); accepted: "),
        ("student", "gpt", r"student.kind is 'gpt'; accepted: .*, or a model: a folder, or a hub name ORG/NAME"),
        ("prompts", "questions", r"prompts.kind is 'questions'.*accepted: .*, or a file \(.jsonl, .txt, .csv, .parq"),
    ],
)
def test_a_word_that_is_neither_is_told_what_it_may_be(key, value, said):
    with pytest.raises(RecipeError, match=said):
        parse_recipe(WORDS | {key: value})


def test_prompts_are_a_file_by_their_ending_and_a_data_set_without(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "bare").write_text("a")
    kinds = {
        "a.jsonl": "file",
        "org/a.json": "file",
        "org/questions": "dataset",
        str(tmp_path / "set"): "dataset",
        str(tmp_path / "bare"): "file",
    }
    assert {name: Prompts.shorthand(name)["kind"] for name in kinds} == kinds
    assert _prompt_block(Path("bare")) == {"kind": "file", "path": "bare"}


def test_a_live_data_set_is_one_split_with_an_end():
    rows = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "hi"}]}] * 2)
    (source,) = parse_recipe(WORDS | {"prompts": _prompt_block(rows)}).prompts
    assert [prompt.column for prompt in source.load()] == ["messages"] * 2
    chats = _prompt_block([[{"role": "user", "content": "hi"}], "hi", {"question": "hi"}])
    assert chats["prompts"] == [{"prompt": [{"role": "user", "content": "hi"}]}, "hi", {"question": "hi"}]
    with pytest.raises(RecipeError, match=r"a DatasetDict of the splits train; give one.* prompts=data\['train'\]"):
        _prompt_block(datasets.DatasetDict({"train": rows}))
    with pytest.raises(RecipeError, match=r"an IterableDataset, which may have no end.*prompts=list\(data.take"):
        _prompt_block(rows.to_iterable_dataset())
