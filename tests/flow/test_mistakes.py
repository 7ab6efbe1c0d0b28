"""Recipes and models that do not fit are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.errors import DataError, IncompatibleError, ModelError, OpdError, RecipeError
from opd.flow.creation import create_flow_model
from opd.language.creation import symbol_tokenizer
from opd.plan import make_plan
from opd.recipe import parse_recipe
from opd.verifiers import ocr
from tests.flow.tiny import PROMPTS, WORDS, block_for, built, recipe_for

MISTAKES = [
    ({"objective": "reverse_kl"}, RecipeError, "objective 'reverse_kl' is for language models.*gaussian_kl"),
    ({"rollout": {"kind": "student"}}, RecipeError, "rollout 'student' is for language.*sde"),
    ({"teacher": {"kind": "local", "model": "x"}}, RecipeError, "teacher 'local' is for language"),
    ({"rollout": {"kind": "mixture"}}, RecipeError, "'student' is for language"),
    ({"verifier": "exact_match"}, RecipeError, "verifier 'exact_match' is for language"),
    ({"objective": "sft"}, IncompatibleError, "noised"),
    ({"end_tokens": [1]}, IncompatibleError, "^end_tokens is .1.: it is for language, .* remove the key"),
    ({"temperature": 0.7}, IncompatibleError, "^temperature is 0.7: it is for language"),
    ({"temperature": {"kind": "linear", "start": 1.0, "end": 0.5}}, IncompatibleError, "^temperature is .* language"),
    ({"evaluation": {"greedy": True}}, IncompatibleError, "^evaluation.greedy is True: .* remove the key"),
    ({"evaluation": {"temperature": 1.0}}, IncompatibleError, "^evaluation.temperature is 1.0: "),
    ({"evaluation": {"top_p": 0.9}}, IncompatibleError, "^evaluation.top_p is 0.9: "),
    ({"evaluation": {"top_k": 5}}, IncompatibleError, "^evaluation.top_k is 5: "),
    ({"evaluation": {"max_new_tokens": 9}}, IncompatibleError, "^evaluation.max_new_tokens is 9: "),
    ({"rollout": {"kind": "sde", "teacher": "x"}}, IncompatibleError, "give that teacher a name"),
    ({"student": {"model": "/nowhere"}}, ModelError, "no folder with a transformer/"),
    ({"student": {"resolution": 12}}, ModelError, "at most 8"),
    ({"student": {"lora": {"targets": ["nothing"]}}}, ModelError, "student.lora.targets"),
    ({"prompts": {"prompts": ["red pig", "red circle", "blue circle"]}}, DataError, "no token.*red pig"),
    ({"prompts": {"prompts": ["red circle square red circle", *PROMPTS]}}, DataError, "at most 4"),
    ({"rollout": {"kind": "noised"}, "objective": "sft", "teacher": []}, DataError, "no column 'image'"),
    (
        {
            "rollout": {"kind": "noised", "times": "grid"},
            "objective": {"kind": "gaussian_kl", "estimator": "pg_sample"},
            "prompts": {"prompts": [{"prompt": text, "image": f"{text}.png"} for text in PROMPTS]},
        },
        IncompatibleError,
        "student's own samples",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes_are_named(changes, error, message, models, drawings, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(drawings[0]["image"]).parent)
    data = block_for(models, tmp_path / "run", **changes)
    with pytest.raises(error, match=message):
        built(parse_recipe(data))


VERDICTS = [
    ("ocr", {}, r"verifier 'ocr' .* none of the 4 .* objective 'grpo' .*'text', .*\['id', 'prompt'\]\."),
    ("ocr", {"txt": "R"}, r"did you mean 'txt'\?"),
    ("drawing", {}, "column 'task' with count or glyph or scene,"),
    ({"kind": "drawing", "reward": {"count": 1, "glyph": 1}}, {"task": "scene"}, "column 'task' with count or glyph,"),
]


@pytest.mark.parametrize(("verifier", "fields", "message"), VERDICTS, ids=[str(i) for i in range(len(VERDICTS))])
def test_rewards_that_no_prompt_can_get_are_refused(verifier, fields, message, models, tmp_path, monkeypatch):
    """GRPO would train with a gradient of zero; of a mixture, rows with a verdict are enough."""
    rows = [{"prompt": text, "id": text, **fields} for text in PROMPTS]
    mixed = [rows[0], *(row | {"text": "4K", "task": "glyph"} for row in rows[1:])]
    learning = {"objective": "grpo", "teacher": [], "verifier": verifier}
    with monkeypatch.context() as installed:
        installed.setattr(ocr.importlib.util, "find_spec", lambda name: object())
        refused, taken, measured = (
            recipe_for(models, tmp_path / "run", prompts={"prompts": prompts}, **changes)
            for prompts, changes in ((rows, learning), (mixed, learning), (rows, {"verifier": verifier}))
        )
    for refuses in (built, make_plan):
        with pytest.raises(DataError, match=message) as found:
            refuses(refused)
        assert len(str(found.value).splitlines()) <= 2
    built(taken)
    # Nobody learns from these verdicts.
    built(measured)


def test_a_row_that_its_reward_cannot_score_is_found_before_training(models, tmp_path, capsys):
    rows = [{"prompt": text, "id": text, "task": "glyph", "text": "4K"} for text in PROMPTS]
    rows[0]["task"] = "count"
    changes = {"prompts": {"prompts": rows}, "verifier": "drawing"}
    with pytest.raises(DataError, match=r"prompts\[0\]: its columns .* count drawing .KeyError: 'number'"):
        built(recipe_for(models, tmp_path / "run", **changes))
    run = built(recipe_for(models, tmp_path / "run", skip_bad_prompts=True, **changes))
    assert "prompts[0]: its columns" in capsys.readouterr().err
    assert PROMPTS[0] not in {prompt.id for prompt in [*run.schedule.prompts, *run.held_out]}


VIEWS = [
    ("red pig", r"prompts\[0\]: column 'hint', which a teacher sees: .* no token .*'red pig'"),
    ("red circle square red circle", "column 'hint', .*at most 4"),
    (
        [{"role": "user", "content": "red circle"}],
        "column 'hint', .* is a list of messages; a flow",
    ),
    (None, "column 'hint', .* is of type NoneType; a flow"),
]


@pytest.mark.parametrize("teacher", [{"kind": "flow"}, {"kind": "self"}], ids=["flow", "self"])
@pytest.mark.parametrize(("view", "message"), VIEWS, ids=[str(i) for i in range(len(VIEWS))])
def test_what_a_teacher_sees_is_checked_as_the_students_prompt_is(view, message, teacher, models, tmp_path):
    rows = [{"prompt": text, "hint": text} for text in PROMPTS]
    of_kind = {"model": models[1]} if teacher["kind"] == "flow" else {}
    changes = {"teacher": {**teacher, **of_kind, "sees": "hint"}}
    built(recipe_for(models, tmp_path / "run", prompts={"prompts": rows}, **changes))
    rows[0]["hint"] = view
    with pytest.raises(DataError, match=message):
        built(recipe_for(models, tmp_path / "run", prompts={"prompts": rows}, **changes))


REFUSED_BY_THE_PLAN = [
    {"rollout": {"kind": "sde", "teacher": "x"}},
    {"student": {"resolution": 12}},
    {"prompts": {"prompts": ["red pig", "red circle", "blue circle"]}},
    {"prompts": {"prompts": ["red circle square red circle", *PROMPTS]}},
    {"prompts": {"kind": "file", "path": "nowhere.jsonl"}},
    {"temperature": 0.7},
    {"evaluation": {"greedy": True}},
    {"prompts": {"prompts": [{"prompt": [{"role": "user", "content": "red circle"}]}] * 4}},
]


@pytest.mark.parametrize("changes", REFUSED_BY_THE_PLAN, ids=lambda changes: next(iter(changes)))
def test_what_a_run_refuses_the_plan_refuses_in_the_same_words(changes, models, tmp_path):
    recipe = recipe_for(models, tmp_path / "run", **changes)
    with pytest.raises(OpdError) as found:
        built(recipe)
    with pytest.raises(type(found.value)) as planned:
        make_plan(recipe)
    assert str(planned.value) == str(found.value)


def test_a_language_recipe_with_a_flow_objective_is_named():
    data = {"student": {"model": "x"}, "teacher": {"model": "y"}, "prompts": {"kind": "inline", "prompts": ["a"]}}
    with pytest.raises(RecipeError, match=r"objective 'gaussian_kl' is for flow models.*reverse_kl"):
        parse_recipe({**data, "objective": "gaussian_kl"})


def test_teachers_that_do_not_fit_are_named(models, tmp_path):
    sizes = {"layers": 1, "heads": 2, "head_width": 8, "prompt_width": 16, "places": 4}
    small = create_flow_model(tmp_path / "small", symbol_tokenizer(WORDS, words=True), size=4, **sizes)
    with pytest.raises(ModelError, match="at most 4"):
        built(recipe_for(models, tmp_path / "run", teacher={"kind": "flow", "model": str(small)}))
    other = create_flow_model(tmp_path / "other", symbol_tokenizer(WORDS[::-1], words=True), size=8, shift=3.0, **sizes)
    with pytest.raises(IncompatibleError, match="read prompts differently"):
        built(recipe_for(models, tmp_path / "run", teacher={"kind": "flow", "model": str(other)}))
    # Written by such a teacher, trajectories would go through other times than the student's.
    late = create_flow_model(tmp_path / "late", symbol_tokenizer(WORDS, words=True), size=8, shift=1.0, **sizes)
    with pytest.raises(IncompatibleError, match=r"scheduler goes through the times 1, .*the same scheduler"):
        built(recipe_for(models, tmp_path / "run", teacher={"kind": "flow", "model": str(late)}))
    with pytest.raises(ModelError, match="holds a model already"):
        create_flow_model(other, symbol_tokenizer(WORDS, words=True))
