"""Recipes and models that do not fit are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.api import distill
from opd.context import Context
from opd.errors import DataError, IncompatibleError, ModelError, OpdError, RecipeError
from opd.flow.creation import create_flow_model
from opd.language.creation import symbol_tokenizer
from opd.plan import make_plan
from opd.policies.flow_transformer import FlowTransformer
from opd.recipe import parse_recipe
from opd.verifiers import ocr
from tests.flow.tiny import PROMPTS, WORDS, block_for, built, recipe_for, tiny_pipeline

MISTAKES = [
    ({"objective": "reverse_kl"}, RecipeError, "objective 'reverse_kl' is for language models.*gaussian_kl"),
    ({"rollout": {"kind": "student"}}, RecipeError, "rollout 'student' is for language.*sde"),
    ({"teacher": {"kind": "local", "model": "x"}}, RecipeError, "teacher 'local' is for language"),
    ({"rollout": {"kind": "mixture"}}, RecipeError, "'student' is for language"),
    ({"verifier": "exact_match"}, RecipeError, "verifier 'exact_match' is for language"),
    ({"objective": "sft"}, IncompatibleError, "noised"),
    ({"end_tokens": [1]}, RecipeError, "end_tokens is .1.: it is for language, .* remove the key"),
    ({"temperature": 0.7}, RecipeError, "temperature is 0.7: it is for language"),
    ({"temperature": {"kind": "linear", "start": 1.0, "end": 0.5}}, RecipeError, "temperature is .* language"),
    ({"evaluation": {"greedy": True}}, RecipeError, "evaluation.greedy is True: .* remove the key"),
    ({"evaluation": {"temperature": 1.0}}, RecipeError, "evaluation.temperature is 1.0: "),
    ({"evaluation": {"top_p": 0.9}}, RecipeError, "evaluation.top_p is 0.9: "),
    ({"evaluation": {"top_k": 5}}, RecipeError, "evaluation.top_k is 5: "),
    ({"evaluation": {"max_new_tokens": 9}}, RecipeError, "evaluation.max_new_tokens is 9: "),
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


def refused_alike(recipe, error, message=None):
    """Whatever a run refuses its plan refuses too, in the same words."""
    with pytest.raises(error, match=message) as found:
        built(recipe)
    with pytest.raises(error) as planned:
        make_plan(recipe)
    assert str(planned.value) == str(found.value)
    assert len(str(found.value).splitlines()) <= 2


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
    assert PROMPTS[0] not in {prompt.id for prompt in [*run.course.prompts, *run.held_out]}


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


def torn(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def configured(folder, name="transformer/config.json", **changes):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))


def flux(folder):
    from diffusers import FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    rest = {"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4), "in_channels": 4}
    shutil.rmtree(folder / "transformer")
    FluxTransformer2DModel(**sizes, **rest).save_pretrained(folder / "transformer")


SCHEDULER = "scheduler/scheduler_config.json"
BROKEN = {
    "torn table": (lambda f: torn(f, "prompt_table/table.safetensors"), "prompt table .* cannot be loaded .*give a"),
    "no table": (lambda f: (f / "prompt_table/table.safetensors").unlink(), "prompt table .* cannot be loaded"),
    "empty table": (lambda f: save_file({}, f / "prompt_table/table.safetensors"), "no 'places.weight'.*give a folder"),
    "no tokenizer": (
        lambda f: [p.unlink() for p in (f / "prompt_table").glob("*.json")],
        "prompt table .* cannot be loaded .*and the files of its tokenizer",
    ),
    "flux": (flux, "FluxTransformer2DModel has no sample_size, pos_embed_max_size; .* SD3Transformer2DModel's argum"),
    "widths": (
        lambda f: configured(f, joint_attention_dim=24),
        "cannot be loaded|joint_attention_dim of its transformer is 24, and its prompt table is made for 16",
    ),
    "not JSON": (lambda f: torn(f, "transformer/config.json"), "cannot be loaded .*transformer.config.json"),
    "no class": (lambda f: configured(f, _class_name="Nothing"), "cannot be loaded .*Nothing"),
    "contradicts": (lambda f: configured(f, caption_projection_dim=24), "cannot be loaded .*; give a folder with the"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "cannot be loaded .*; give a folder with the files"),
    "scheduler not JSON": (lambda f: torn(f, SCHEDULER), "cannot be loaded .*; give a folder with the files"),
    "shifting": (lambda f: configured(f, SCHEDULER, use_dynamic_shifting=True), "its scheduler shifts times by image"),
    "size": (
        lambda f: configured(f, sample_size=4000),
        "resolution is 4000, the model's own; give a multiple of 4, at",
    ),
    "torn weights": (lambda f: torn(f, "transformer/diffusion_pytorch_model.safetensors"), "cannot be loaded"),
}
UNSEEN_BY = {
    "torn weights": lambda refusing, whose: refusing is make_plan,
    "size": lambda refusing, whose: whose == "teacher",
}
"""The plan reads no weights, and a teacher draws at the student's resolution."""


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_no_flow_model_is_named_by_the_run_and_its_plan(name, whose, models, tmp_path):
    breaking, message = BROKEN[name]
    folder = Path(shutil.copytree(models[1], tmp_path / "broken"))
    breaking(folder)
    changes = {"student": {"model": str(folder)}} if whose == "student" else {}
    changes = changes or {"teacher": {"kind": "flow", "model": str(folder)}}
    recipe = recipe_for(models, tmp_path / "run", **changes)
    for refusing in (built, make_plan):
        if name in UNSEEN_BY and UNSEEN_BY[name](refusing, whose):
            continue
        with pytest.raises(ModelError, match=message) as found:
            refusing(recipe)
        assert len(str(found.value).splitlines()) <= 2


@pytest.mark.parametrize("lacking", ["scheduler", "vae", "text_encoder", "model_index.json"])
def test_a_pipelines_missing_parts_are_named_by_the_run_and_its_plan(lacking, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    place = tmp_path / "pipeline" / lacking
    place.unlink() if place.is_file() else shutil.rmtree(place)
    recipe = recipe_for([str(tmp_path / "pipeline")] * 2, tmp_path / "run", teacher={"kind": "self"})
    refused_alike(recipe, ModelError, f"cannot be loaded .*{lacking}.*; give a folder with")


def test_a_live_student_of_float16_is_trained_by_adapters_alone(tmp_path):
    pipe, settings = tiny_pipeline().to(torch.float16), FlowTransformer(model="x")
    with pytest.raises(ModelError, match=r"the live student's dtype float16 .*use bfloat16, or lora"):
        settings.live_student(pipe, None, Context(torch.device("cpu")))
    adapted = FlowTransformer(model="x", dtype="float16", lora={"rank": 2})
    trained = adapted.live_student(pipe, None, Context(torch.device("cpu"))).state_dict()
    assert {p.dtype for name, p in trained.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_live_pipeline_that_is_no_flow_model_is_named(role, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

    def refused(message, pipe):
        models = {"student": tiny_pipeline(1), "teacher": tiny_pipeline(2), role: pipe}
        settings = block_for(["x", "x"], tmp_path / "run")
        settings = {k: v for k, v in settings.items() if k not in models and k != "prompts"}
        with pytest.raises(ModelError, match=message) as found:
            distill(models["student"], models["teacher"], PROMPTS, quiet=True, **settings)
        assert len(str(found.value).splitlines()) <= 2

    def pipeline(**parts):
        pipe = tiny_pipeline()
        pipe.register_modules(**parts)
        return pipe

    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    plain = UNet2DModel(4, norm_num_groups=2, **blocks)
    refused("a live DDPMPipeline has no transformer; pass a StableDiffusion3Pip", DDPMPipeline(plain, DDPMScheduler()))
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    refused("scheduler shifts times by image size.*use_dynamic_shifting false", pipeline(scheduler=shifting))
    refused("DDPMScheduler has no sigmas; take a FlowMatchEulerDiscreteSch", pipeline(scheduler=DDPMScheduler()))
    refused(
        "a live StableDiffusion3Pipeline: UNet2DModel has no patch_size, .*hidden_states", pipeline(transformer=plain)
    )


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
