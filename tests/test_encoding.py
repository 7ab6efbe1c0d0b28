"""What a row asks for reaches the model, and completions end where the chat template ends an answer."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from opd.context import Context
from opd.errors import DataError, IncompatibleError
from opd.language.agreement import Vocabulary, agree_on_end, end_ids, notes_on_end
from opd.language.encoding import read_by, turn_end
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.language.tokens import Tokens
from opd.policies.causal_lm import CausalLMStudent
from opd.prompts import Prompt
from opd.rollouts.data import DataRollout, StoredResponses
from tests.conftest import tiny_model
from tests.tiny import CHAT, TEXTS, saved, short_run, turn_tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
USER = [{"role": "user", "content": "hi"}]


def reader(tokenizer, template="chat", **options) -> LanguageModel:
    return LanguageModel(None, tokenizer, template, options)


def text_of(language, **fields) -> str:
    return language.tokenizer.decode(language.encode(Prompt("a", fields, where="here:1")))


def tokens_of(language, text) -> list[str]:
    return language.tokenizer.convert_ids_to_tokens(language.encode(Prompt("a", {"prompt": text})).tolist())


@pytest.mark.parametrize("form", [lambda x: x, json.dumps], ids=["objects", "JSON in a table's cell"])
def test_a_rows_tools_and_template_arguments_reach_the_template(form):
    language = reader(turn_tokenizer(CHAT), enable_thinking=True)
    row = {"prompt": USER, "tools": form(TOOLS), "chat_template_kwargs": form({"enable_thinking": False})}
    wanted = language.tokenizer.apply_chat_template(
        USER, tools=TOOLS, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text_of(language, **row) == wanted
    assert "T:1" in wanted
    assert wanted.endswith("<think></think>")
    # The row's arguments win over the model's, and only in that row.
    assert not text_of(language, prompt=USER).endswith("</think>")
    assert not language.notes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "not JSON"}, "column 'tools' holds a text that is not JSON"),
        ({"tools": {"a": 1}}, "column 'tools' holds dict"),
        ({"tools": ["add"]}, "column 'tools' holds something else"),
        ({"chat_template_kwargs": [1]}, "column 'chat_template_kwargs' holds list"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize' among the arguments .* is set by opd"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "is the template itself"),
    ],
)
def test_arguments_of_a_row_that_cannot_be_handed_on_are_refused(fields, message):
    with pytest.raises(DataError, match=rf"here:1: .*{message}"):
        text_of(reader(turn_tokenizer(CHAT)), prompt="hi", **fields)


def test_arguments_that_nobody_reads_are_refused_or_said_once():
    silent = turn_tokenizer("{% for m in messages %}{{ m['content'] }}<end_of_turn>{% endfor %}")
    with pytest.raises(DataError, match="the row has tools, and the chat template of the model writes none"):
        text_of(reader(silent), prompt="hi", tools=TOOLS)
    language = reader(silent, enable_thinking=False)
    for _ in range(2):
        text_of(language, prompt="hi")
    assert language.notes == ["the chat template of the model reads no 'enable_thinking'; it changes nothing there"]
    # A part of a name, or a word of the template's own text, is no variable that it reads.
    thinks = turn_tokenizer(
        "{% if enable_thinking %}<think>{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    for misspelt, close in (("enable_thinkin", True), ("think", True), ("m", False)):
        language = reader(thinks, **{misspelt: True})
        text_of(language, prompt="hi")
        hint = " (did you mean 'enable_thinking'?)" if close else ""
        assert language.notes == [
            f"the chat template of the model reads no {misspelt!r}{hint}; it changes nothing there"
        ]
    language = reader(thinks, enable_thinking=True)
    text_of(language, prompt="hi")
    assert language.notes == []


def test_what_a_template_reads_is_found_or_left_open():
    assert "x" in (read_by("{% set x = x if x is defined else 3 %}{{ x }}") or ())
    assert "x" in (read_by("{% if not x is defined %}{% set x = true %}{% endif %}{{ x }}") or ())
    assert "x" in (read_by("{% generation %}{{ x }}{% endgeneration %}{% for a in b %}{% break %}{% endfor %}") or ())
    assert read_by("{{ x | unknown_filter }}") is None
    assert read_by("{% unknown_mark %}") is None
    with pytest.raises(DataError, match=r"the row has 'tools'.*template: plain"):
        text_of(reader(turn_tokenizer(), "plain"), prompt="hi", tools=TOOLS)
    with pytest.raises(ValidationError, match="template: plain applies no template"):
        ModelSettings(model="a", template="plain", template_options={"enable_thinking": False})


def test_student_and_teacher_get_the_rows_arguments(tmp_path):
    student, teacher = (tiny_model(vocabulary=90, seed=seed) for seed in (0, 1))
    tokenizer = turn_tokenizer(CHAT)
    seen = []
    original = LanguageModel.forward

    def forward(self, contexts, completions, layout="auto"):
        seen.extend((self.owner.split()[1], tokenizer.decode(ids)) for ids in contexts)
        return original(self, contexts, completions, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "forward", forward)
        short_run(
            tmp_path / "run",
            {"model": saved(tmp_path / "s", student, tokenizer)},
            {"model": saved(tmp_path / "t", teacher, tokenizer)},
            [{"prompt": t, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}} for t in TEXTS],
            steps=1,
            self_test=False,
        )
    assert {who for who, _ in seen} == {"student", "teacher"}
    assert all(text.startswith("T:1") and text.endswith("<think></think>") for _, text in seen)


REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_template_that_refuses_a_row_is_named_with_the_row(who, tmp_path):
    models = {
        name: {
            "model": saved(
                tmp_path / name, tiny_model(vocabulary=90), turn_tokenizer(REFUSING if name == who else CHAT)
            )
        }
        for name in ("student", "teacher")
    }
    rows = [{"prompt": [{"role": "system", "content": "be kind"}, *USER]} if i == 3 else t for i, t in enumerate(TEXTS)]
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    with pytest.raises(DataError, match=rf"prompts\[3\]: the chat template of the {who}.*System role not supported"):
        short_run(tmp_path / "run", models["student"], models["teacher"], rows)


def test_text_parts_are_joined_for_a_template_that_reads_texts_and_texts_made_parts_for_the_other():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    texts = reader(turn_tokenizer(CHAT))
    assert text_of(texts, prompt=[{"role": "user", "content": parts}]) == text_of(texts, prompt="hi")
    writes_parts = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}<end_of_turn>{% endfor %}"
    )
    assert text_of(reader(turn_tokenizer(writes_parts)), prompt="hi") == "hi<end_of_turn>"
    assert turn_end(reader(turn_tokenizer(writes_parts))) == 5


def test_plain_text_begins_once_and_does_not_end():
    both = reader(turn_tokenizer(begins=True, ends=True), "plain")
    assert tokens_of(both, "ab") == ["<bos>", "a", "b"]
    assert tokens_of(both, "<bos>ab") == ["<bos>", "a", "b"]
    assert tokens_of(both, "<bos>ab") == ["<bos>", "a", "b"]
    assert len(both.notes) == 2
    assert "'<eos>' behind every text" in both.notes[0]
    assert "begin with '<bos>' already" in both.notes[1]
    nothing = reader(turn_tokenizer(), "plain")
    assert tokens_of(nothing, "<bos>ab<eos>") == ["<bos>", "a", "b", "<eos>"]
    assert not nothing.notes
    written = reader(turn_tokenizer("{{ bos_token }}" + CHAT, begins=True, ends=True))
    assert tokens_of(written, "hi").count("<bos>") == 1
    assert not written.notes


def test_the_end_of_a_turn_is_taken_from_the_template():
    language = LanguageModel(tiny_model(vocabulary=90, eos_token_id=1), turn_tokenizer(CHAT))
    assert turn_end(language) == 5
    assert end_ids(language) == {1, 5}
    assert turn_end(reader(turn_tokenizer(CHAT), "plain")) is None
    # No special token behind the answer, and a template that does not write one.
    assert turn_end(reader(turn_tokenizer("{% for m in messages %}{{ m['content'] }} .\n{% endfor %}"))) is None
    assert turn_end(reader(turn_tokenizer("{{ raise_exception('no') }}"))) is None


def ends(student, teacher, given=None, vocabulary=Vocabulary(90)):  # noqa: B008
    chosen = agree_on_end(student, [("the teacher", teacher)], given)
    return chosen, notes_on_end(student, [("the teacher", teacher)], chosen, given is not None, vocabulary)


def test_what_ends_a_completion_is_said():
    chat = LanguageModel(tiny_model(vocabulary=90, eos_token_id=1), turn_tokenizer(CHAT))
    plain = LanguageModel(tiny_model(vocabulary=90, eos_token_id=1), turn_tokenizer(), "plain")
    named = LanguageModel(tiny_model(vocabulary=90, eos_token_id=[1, 5]), turn_tokenizer(CHAT))
    chosen, notes = ends(chat, named)
    assert chosen == (1, 5)
    (note,) = notes
    assert "chat template ends an answer with '<end_of_turn>' (id 5)" in note
    assert ends(named, named) == ((1, 5), [])
    (note,) = ends(plain, named)[1]
    assert "with '<eos>' (id 1) and those of the teacher with '<eos>' (id 1), '<end_of_turn>' (id 5)" in note
    assert ends(plain, named, [1]) == ((1,), [])
    (note,) = ends(plain, plain, [5])[1]
    assert "those of the teacher" in note
    assert "ends no completion" in ends(named, named, vocabulary=Vocabulary(90, (5,)))[1][0]
    with pytest.raises(IncompatibleError, match="no completion could end: '<end_of_turn>'"):
        ends(named, named, [5], Vocabulary(90, (5,)))


def test_completions_end_with_the_turn_and_so_does_the_saved_student(tmp_path, capsys):
    tokenizer = turn_tokenizer(CHAT)
    student, teacher = (tiny_model(vocabulary=90, seed=seed, eos_token_id=1) for seed in (0, 1))
    with torch.no_grad():
        student.lm_head.weight.zero_()
    result = short_run(
        tmp_path / "run",
        {"model": saved(tmp_path / "s", student, tokenizer)},
        {"model": saved(tmp_path / "t", teacher, tokenizer)},
        update={"learning_rate": 1e-6},
        rollout={"max_new_tokens": 200},
        evaluation={"held_out": 4, "samples": 4},
    )
    # A student that draws every token alike ends at one of two ids, and not only at one of them.
    assert result.after["truncated"] < 1
    rows = [json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()]
    assert "<end_of_turn>" in {row["tokens"][-1] for row in rows if row["finished"]}
    assert "chat template ends an answer with '<end_of_turn>'" in capsys.readouterr().err
    saved_config = json.loads((result.directory / "student" / "generation_config.json").read_text())
    assert saved_config["eos_token_id"] == [1, 5]


@pytest.mark.parametrize(("given", "written"), [((5,), [5]), ((0,), 0), ((), 0)])
def test_a_saved_student_ends_where_its_completions_ended(given, written, tmp_path):
    language = LanguageModel(tiny_model(vocabulary=90, eos_token_id=0), turn_tokenizer(), "plain")
    CausalLMStudent(language, None, Context(torch.device("cpu"), agreed=Tokens(end_ids=given))).save(tmp_path, "card")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == written


def test_a_stored_response_ends_as_the_template_ends_an_answer():
    tokenizer = turn_tokenizer(CHAT, begins=True, ends=True)
    for template, end_of_run, end in (("chat", (1, 5), 5), ("plain", (1, 5), 1), ("chat", (1,), 1)):
        language = LanguageModel(tiny_model(vocabulary=90), tokenizer, template)
        source = StoredResponses(
            DataRollout(), language, Context(torch.device("cpu"), agreed=Tokens(end_ids=end_of_run))
        )
        assert source.encode("ab", 10)[0].tolist() == [*tokenizer.convert_tokens_to_ids(["a", "b"]), end]
