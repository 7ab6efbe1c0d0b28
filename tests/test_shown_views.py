"""What a teacher is shown before the prompt that its student is not: a system text and examples."""

from __future__ import annotations

import json

import pytest
import torch

from opd.errors import IncompatibleError, RecipeError
from opd.language.engines.transformers import LanguageModel
from opd.plan import make_plan
from opd.policies.causal_lm import CausalLMStudent
from opd.prompts import Prompt
from opd.recipe import load_recipe, parse_recipe
from opd.teachers.local import LocalTeacher
from opd.teachers.self_teacher import SelfTeacher
from tests.conftest import tiny_model, trajectories_of
from tests.tiny import CHAT, saved, short_run, turn_tokenizer

EXAMPLES = [{"prompt": "add 1+1", "response": "2"}, {"prompt": "add 2+1", "response": "3"}]
TURNS = [
    {"role": "user", "content": "add 1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "add 2+1"},
    {"role": "assistant", "content": "3"},
]
USER = {"role": "user", "content": "add 2+2"}
REST = {"student": "org/small", "prompts": ["p.jsonl"]}


def seen(settings, prompt):
    row, column = settings.view(prompt)
    return row.view(column)


def test_a_system_text_and_examples_stand_before_the_prompt():
    settings = SelfTeacher(mode="frozen", system="be brief", examples=EXAMPLES)
    told = {"role": "system", "content": "be brief"}
    assert seen(settings, Prompt("a", {"prompt": "add 2+2"})) == [told, *TURNS, USER]
    own = [{"role": "system", "content": "be kind"}, USER]
    both = {"role": "system", "content": "be brief\n\nbe kind"}
    assert seen(settings, Prompt("a", {"prompt": own})) == [both, *TURNS, USER]
    # Without a system text of the teacher's the row's own stays first.
    assert seen(SelfTeacher(examples=EXAMPLES), Prompt("a", {"prompt": own})) == [own[0], *TURNS, USER]
    assert own == [{"role": "system", "content": "be kind"}, USER]


def test_they_stand_before_the_column_that_it_sees_and_the_row_keeps_its_tools():
    row = {"prompt": "x", "hint": "add 2+2", "tools": [{"name": "add"}]}
    view, column = LocalTeacher(model="m", sees="hint", system="s").view(Prompt("a", row, "prompt"))
    assert view.view(column) == [{"role": "system", "content": "s"}, USER]
    assert view.fields["tools"] == row["tools"]
    plain = LocalTeacher(model="m", sees="hint")
    assert plain.view(Prompt("a", row)) == (Prompt("a", row), "hint")


def test_examples_of_a_file_are_read_into_the_recipe(tmp_path):
    rows = [EXAMPLES[0], {"messages": TURNS[2:]}]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.yaml"
    path.write_text("student: org/small\nteacher: {kind: self, examples: shots.jsonl}\nprompts: p.jsonl\n")
    recipe = load_recipe(str(path))
    assert [each.model_dump() for each in recipe.teacher[0].examples] == EXAMPLES
    assert recipe.dump()["teacher"][0]["examples"] == EXAMPLES


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "teacher.examples is .*no file"),
        ([{"prompt": "a"}], r"shots.jsonl:1: an example needs its answer, a text in the column 'response'"),
        ([{"messages": TURNS}], "an example is one question and its answer, and this row has 3 messages before"),
    ],
)
def test_a_file_that_holds_no_examples_is_refused(tmp_path, rows, said):
    if rows is not None:
        (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"kind": "self", "examples": str(tmp_path / "shots.jsonl")}
    with pytest.raises(RecipeError, match=said):
        parse_recipe(REST | {"teacher": block})


@pytest.fixture
def chatting(student):
    tokenizer = turn_tokenizer(CHAT)
    language = LanguageModel(tiny_model(vocabulary=len(tokenizer)), tokenizer, "chat")
    return CausalLMStudent(language, None, student.context)


def test_the_teacher_scores_under_what_it_is_shown(chatting):
    """Its answer is that of a row which holds the whole view in a column."""
    whole = [{"role": "system", "content": "s"}, *TURNS, USER]
    prompts = [Prompt("a", {"prompt": "add 2+2", "whole": whole})]
    context = chatting.context
    contexts = [chatting.language.encode(prompt) for prompt in prompts]
    trajectories = trajectories_of([4], contexts, prompts=prompts)
    shown = SelfTeacher(mode="frozen", system="s", examples=EXAMPLES)
    found = [
        settings.build(context, chatting).answer(trajectories, settings, context)[0].distribution.hidden
        for settings in (shown, SelfTeacher(mode="frozen", sees="whole"), SelfTeacher(mode="frozen"))
    ]
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 0.1


@pytest.mark.parametrize(("own", "told"), [("", "16 tokens before a prompt"), ("you are kind", "6 tokens less of a")])
def test_a_plan_says_what_a_teacher_reads_more_or_less(own, told, tmp_path):
    """A template may write a text of its own where nobody gave a system message; the teacher's takes its place."""
    system = f"{{% if messages[0]['role'] != 'system' %}}<turn>system\n{own}<end_of_turn>\n{{% endif %}}" if own else ""
    tokenizer = turn_tokenizer(system + CHAT)
    folder = saved(tmp_path / "model", tiny_model(vocabulary=len(tokenizer)), tokenizer)
    rows = {"kind": "inline", "prompts": ["add 1+2"] * 4}
    teacher = {"kind": "self", "mode": "frozen", "system": "you ok"}
    block = {"student": {"model": folder}, "teacher": teacher, "prompts": rows, "evaluation": {"held_out": 1}}
    plan = make_plan(parse_recipe(block))
    assert any(told in note for note in plan.notes), plan.notes


def test_where_no_template_writes_turns_it_is_refused(student):
    with pytest.raises(IncompatibleError, match=r"teacher.system is written by a chat template, .* template: plain"):
        SelfTeacher(mode="frozen", system="s").build(student.context, student)
    flow = {"student": {"kind": "flow_transformer", "model": "m"}, "prompts": ["p.jsonl"], "rollout": "sde"}
    flow |= {"objective": "gaussian_kl"}
    with pytest.raises(RecipeError, match=r"teacher.examples is written by the chat template of a language model"):
        parse_recipe(flow | {"teacher": {"kind": "self", "examples": EXAMPLES}})
    debate = {"kind": "debate", "experts": {"a": {"model": "m", "system": "s"}}}
    with pytest.raises(RecipeError, match=r"expert 'a' is shown a system text"):
        parse_recipe(REST | {"teacher": debate})


def test_a_student_learns_to_do_without(tmp_path):
    """Context distillation, whole: what it costs in tokens is in the summary, and the card says what was seen."""
    tokenizer = turn_tokenizer(CHAT)
    model = saved(tmp_path / "m", tiny_model(vocabulary=len(tokenizer)), tokenizer)
    teacher = {"kind": "self", "mode": "frozen", "system": "be kind", "examples": EXAMPLES}
    result = short_run(
        tmp_path / "run",
        {"model": model},
        teacher,
        objective="forward_kl",
        evaluation={"held_out": 2, "samples": 1, "teacher_answers": True},
    )
    tokens = result.summary["prompt_tokens"]
    assert tokens["teacher"] - tokens["student"] == sum(
        len(tokenizer(f"<turn>{turn['role']}\n{turn['content']}<end_of_turn>\n")["input_ids"])
        for turn in [{"role": "system", "content": "be kind"}, *TURNS]
    )
    card = (result.directory / "student" / "README.md").read_text()
    assert 'saw the system text "be kind" and 2 examples before each prompt; the student did not' in card


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


def noted(teacher, student, prompts):
    """What the plan says of views."""
    rest = {"hardware": {"device": "cpu"}, "evaluation": {"held_out": 1}, "batch": {"prompts": 1}}
    plan = make_plan(parse_recipe({"student": student, "teacher": teacher, "prompts": prompts, **rest}))
    return [note.split(" before a prompt")[0] for note in plan.notes if "before a prompt" in note]


def test_the_plan_reads_a_view_as_its_teacher_does(tmp_path):
    """Of a student whose template has no system text, and of a route at a prompt of its own."""
    student, teacher = (
        saved(tmp_path / name, tiny_model(vocabulary=len(tokenizer)), tokenizer)
        for name, tokenizer in (("student", turn_tokenizer(NO_SYSTEM)), ("teacher", turn_tokenizer(CHAT)))
    )
    shown = len("system\nbe kind\n") + 2
    told = [f"teacher {teacher} reads {shown} tokens"]
    rows = {"kind": "inline", "prompts": [{"prompt": text, "task": "a"} for text in ("ab", "abc")]}
    for own in ({}, {"tokenizer": "own"}):
        assert noted({"model": teacher, "system": "be kind", **own}, student, rows) == told
    rows["prompts"] += [{"prompt": text, "task": "b", "hint": "short"} for text in ("abcd", "abcde")]
    hinted = {"model": teacher, "system": "be kind", "sees": "hint"}
    routed = {"kind": "routed", "by": "task", "routes": {"a": {"model": teacher}, "b": hinted}}
    assert noted(routed, student, rows) == told
