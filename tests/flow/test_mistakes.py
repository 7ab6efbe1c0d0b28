"""Recipes and models that do not fit are named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.context import Context
from opd.errors import DataError, IncompatibleError, ModelError, OpdError, RecipeError
from opd.flow.creation import create_flow_model
from opd.language.creation import symbol_tokenizer
from opd.plan import make_plan
from opd.policies.flow_transformer import FlowTransformer
from opd.recipe import parse_recipe
from tests.flow.tiny import PROMPTS, WORDS, block_for, built, recipe_for, tiny_pipeline

MISTAKES = [
    ({"objective": "reverse_kl"}, RecipeError, "objective 'reverse_kl' is for language models.*gaussian_kl"),
    ({"rollout": {"kind": "student"}}, RecipeError, "rollout 'student' is for language.*sde"),
    ({"teacher": {"kind": "local", "model": "x"}}, RecipeError, "teacher 'local' is for language"),
    ({"rollout": {"kind": "mixture"}}, RecipeError, "'student' is for language"),
    ({"verifier": "exact_match"}, RecipeError, "verifier 'exact_match' is for language"),
    ({"objective": "sft"}, IncompatibleError, "noised"),
    ({"end_tokens": [1]}, IncompatibleError, "remove the key"),
    ({"rollout": {"kind": "sde", "teacher": "x"}}, IncompatibleError, "give that teacher a name"),
    ({"student": {"model": "/nowhere"}}, ModelError, "no folder with a transformer/"),
    ({"student": {"resolution": 12}}, ModelError, "at most 8"),
    ({"student": {"dtype": "float16"}}, RecipeError, "student.lora is None: student.dtype float16 .*use bfloat16, or"),
    ({"student": {"lora": {"targets": ["nothing"]}}}, ModelError, "student.lora.targets"),
    ({"prompts": {"prompts": ["red pig", "red circle", "blue circle"]}}, DataError, "no token.*red pig"),
    ({"prompts": {"prompts": ["red circle square red circle", *PROMPTS]}}, DataError, "at most 4"),
    ({"rollout": {"kind": "noised"}, "objective": "sft", "teacher": []}, DataError, "no column 'image'"),
    (
        {
            "rollout": {"kind": "noised", "times": "grid"},
            "objective": {"kind": "gaussian_kl", "estimator": "pg_sample"},
            "prompts": {"prompts": [{"prompt": text, "image": "x.png"} for text in PROMPTS]},
        },
        IncompatibleError,
        "student's own samples",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes_are_named(changes, error, message, models, tmp_path):
    data = block_for(models, tmp_path / "run", **changes)
    with pytest.raises(error, match=message):
        built(parse_recipe(data))


def refused_alike(recipe, error, message=None):
    """Whatever a run refuses its plan refuses too, in the same words."""
    with pytest.raises(error, match=message) as found:
        built(recipe)
    with pytest.raises(error) as planned:
        make_plan(recipe)
    assert str(planned.value) == str(found.value)
    assert len(str(found.value).splitlines()) <= 2


REFUSED_BY_THE_PLAN = [
    {"rollout": {"kind": "sde", "teacher": "x"}},
    {"student": {"resolution": 12}},
    {"prompts": {"prompts": ["red pig", "red circle", "blue circle"]}},
    {"prompts": {"prompts": ["red circle square red circle", *PROMPTS]}},
    {"prompts": {"kind": "file", "path": "nowhere.jsonl"}},
    {"prompts": {"prompts": [{"prompt": [{"role": "user", "content": "red circle"}]}] * 4}},
]


@pytest.mark.parametrize("changes", REFUSED_BY_THE_PLAN, ids=lambda changes: next(iter(changes)))
def test_what_a_run_refuses_the_plan_refuses_in_the_same_words(changes, models, tmp_path):
    recipe = recipe_for(models, tmp_path / "run", **changes)
    refused_alike(recipe, OpdError)


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    """The folder of an adapter of the first model."""
    folder = tmp_path_factory.mktemp("adapter")
    student = FlowTransformer(model=models[0], lora={"rank": 2}).build(Context(torch.device("cpu")))
    student.save(folder, "")
    return folder / "adapter"


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_adapters_that_cannot_be_taken_are_named_by_the_plan_too(whose, models, adapter, tmp_path):
    def refused(message, folder):
        kinds = {"student": {"model": models[0]}, "teacher": {"kind": "flow", "model": models[1]}}
        changes = {whose: {**kinds[whose], "adapter": str(folder)}}
        refused_alike(recipe_for(models, tmp_path / "run", **changes), ModelError, message)

    refused("no such folder; give one with adapter_config.json", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no readable adapter_config.json .*save the adapter again", tmp_path / "empty")
    torn = shutil.copytree(adapter, tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-9])
    refused("torn/adapter_model.safetensors cannot be read as safetensors", torn)
    state = load_file(adapter / "adapter_model.safetensors")
    wide = shutil.copytree(adapter, tmp_path / "wide")
    wider = {name: torch.zeros(len(a), 24) if "lora_A" in name else a for name, a in state.items()}
    save_file(wider, wide / "adapter_model.safetensors")
    refused(r"changes a weight of \[16, 24\], transformer_blocks.*the transformer has one of \[16, 16\]", wide)
    lost = shutil.copytree(adapter, tmp_path / "lost")
    save_file(
        {name.replace("blocks.0", "blocks.7"): a for name, a in state.items()}, lost / "adapter_model.safetensors"
    )
    refused("blocks.7.*has no such weight; give an adapter that was trained on this model", lost)


def test_what_peft_alone_sees_in_an_adapter_is_named(models, adapter, tmp_path):
    """Factors of another rank than the configuration's."""
    ranked = shutil.copytree(adapter, tmp_path / "ranked")
    config = json.loads((ranked / "adapter_config.json").read_text())
    (ranked / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(ModelError, match=r"cannot be loaded \(size mismatch for .*; give the folder of a LoRA adapter"):
        built(recipe_for(models, tmp_path / "run", student={"adapter": str(ranked)}))


def test_an_adapter_of_the_hub_is_noted_by_the_plan(models, tmp_path):
    plan = make_plan(recipe_for(models, tmp_path / "run", student={"adapter": "org/adapter"}))
    assert "org/adapter: not read; the adapter is taken to fit" in plan.notes


def test_a_live_student_of_float16_is_trained_by_adapters_alone(tmp_path):
    pipe, settings = tiny_pipeline().to(torch.float16), FlowTransformer(model="x")
    with pytest.raises(ModelError, match=r"the live student's dtype float16 .*use bfloat16, or lora"):
        settings.live_student(pipe, None, Context(torch.device("cpu")))
    adapted = FlowTransformer(model="x", dtype="float16", lora={"rank": 2})
    trained = adapted.live_student(pipe, None, Context(torch.device("cpu"))).state_dict()
    assert {p.dtype for name, p in trained.items() if "lora_" in name} == {torch.float32}


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
