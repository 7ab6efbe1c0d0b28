"""The first command: its recipe asks for what its examples show, and its command takes overrides as any other."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from opd.cli.display import change_of, headlines
from opd.cli.main import main
from opd.prompts import load_prompts
from opd.recipe import load_recipe


def test_the_examples_are_in_the_form_that_is_measured():
    recipe = load_recipe("quickstart")
    (teacher,) = recipe.teacher
    prompts = load_prompts(recipe.prompts)
    assert len({prompt.view().lower() for prompt in prompts}) == len(prompts)
    assert len(teacher.examples) == 4
    asked = {prompt.view() for prompt in prompts}
    for example in teacher.examples:
        assert recipe.verifier.score(prompts[0], example.response) == 1
        assert example.prompt not in asked


def test_the_command_takes_overrides(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opd", "quickstart", "steps=0"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert "steps is 0" in capsys.readouterr().err


def test_what_a_person_asks_first_stands_under_the_table():
    measured = SimpleNamespace(
        before={"accuracy": 0.0},
        after={"accuracy": 0.75, "teacher_accuracy": 0.9},
        summary={"held_out_prompts": 32, "prompt_tokens": {"student": 38.4, "teacher": 163.4}},
    )
    assert headlines(measured, load_recipe("quickstart")) == [
        "json_object, of 32 held-out answers: 0.00 before, 0.75 after; the teacher's own answers 0.90",
        "tokens of a prompt: 38 for the student, 163 for its teacher: 125 saved each time",
    ]
    assert headlines(measured, load_recipe("heal"))[1:] == []


def test_shares_change_by_points_and_other_figures_by_a_part_of_themselves():
    assert change_of("accuracy", 0.75, 0.833) == "+8 points"
    assert change_of("reverse_kl", 2.0, 0.5) == "-75%"
    assert change_of("reverse_kl", 0.0, 0.5) == ""
    assert change_of("of_somebody", 0.5, 0.25) == "-50%"


@pytest.mark.parametrize(
    ("after", "count", "told"), [(0.4, 16, 0.33), (0.4, 64, 0.16), (0.6, 64, None), (0.31, 900, None)]
)
def test_a_difference_that_few_answers_have_by_chance_is_called_so(after, count, told):
    measured = SimpleNamespace(before={"accuracy": 0.3}, after={"accuracy": after}, summary={"held_out_prompts": count})
    line = headlines(measured, load_recipe("quickstart"))[0]
    assert (f"; so few answers differ by {told:.2f} by chance" in line) if told else ("by chance" not in line)
