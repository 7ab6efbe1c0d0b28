"""Models: guidance, adapters, what is saved, and plain diffusers beside it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from opd.api import distill, execute
from opd.cli.main import main
from opd.context import Context
from opd.errors import DataError, ModelError, OpdError, RecipeError, RunError
from opd.flow.creation import create_flow_model
from opd.flow.model import FlowModel, load_flow_model
from opd.language.creation import symbol_tokenizer
from opd.merging import merge
from opd.plan import make_plan
from opd.planning import saved_bytes
from opd.policies.flow_transformer import FlowTransformer
from opd.prompts import Prompt
from opd.recipe import load_recipe
from opd.rollouts.sde import SDERollout
from tests.conftest import writing
from tests.flow.tiny import PROMPTS, WORDS, block_for, recipe_for, step_of, tiny_pipeline


def test_lora_trains_adapters_alone_and_saves_both_forms(models, tmp_path):
    from diffusers import SD3Transformer2DModel

    lora = {"rank": 2, "alpha": 4}
    result = execute(recipe_for(models, tmp_path / "run", student={"lora": lora}), quiet=True)
    trained = [n for n, p in result.student.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    folder = result.directory / "student"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, models[0])
    merged = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    # The adapter says what it changes: nobody has to name the base. The average of one with itself is that one.
    factors = merge([result.directory, result.directory], tmp_path / "factors", average="factors", form="dense")
    same = SD3Transformer2DModel.from_pretrained(factors, subfolder="transformer")
    for ours, theirs in zip(same.parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    inputs = (torch.randn(1, 3, 8, 8), torch.randn(1, 4, 16), torch.randn(1, 16), torch.tensor([500.0]))
    torch.testing.assert_close(merged(*inputs).sample, result.student.transformer(*inputs).sample, atol=1e-5, rtol=1e-4)
    other = FlowTransformer(model=models[0], adapter=str(folder / "adapter")).build(Context(torch.device("cpu")))
    torch.testing.assert_close(other.model.transformer(*inputs).sample, merged(*inputs).sample, atol=1e-5, rtol=1e-4)
    # On top of that adapter a second one changes weights that lie nowhere, and says nothing alone.
    student = {"lora": lora, "adapter": str(folder / "adapter")}
    again = execute(recipe_for(models, tmp_path / "again", student=student), quiet=True)
    assert not (again.directory / "student" / "adapter").exists()
    merged = SD3Transformer2DModel.from_pretrained(again.directory / "student", subfolder="transformer")
    torch.testing.assert_close(merged(*inputs).sample, again.student.transformer(*inputs).sample, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="has no adapter"):
        merge([result.directory, again.directory], tmp_path / "merged", form="adapter")


def test_the_plan_counts_what_the_models_are(models, tmp_path):
    teachers = [{"kind": "flow", "model": models[1], "name": "expert"}, {"kind": "self", "name": "anchor"}]
    recipe = recipe_for(models, tmp_path / "run", teacher=teachers)
    plan = make_plan(recipe)
    student = FlowTransformer(model=models[0]).build(Context(torch.device("cpu")))
    count = sum(p.numel() for p in student.model.transformer.parameters())
    assert plan.models["student"].trainable == plan.models["teacher 0"].parameters == count
    assert plan.as_dict()["denoising_steps_per_step"] == {"sampled": 32, "trained": 24}
    assert plan.memory["student weights"] == plan.memory["teacher 1 weights"] == 4 * count
    kept = saved_bytes(
        student.model.transformer,
        lambda: student.model(
            torch.zeros(3, 3, 8, 8), torch.ones(3), student.model.encoder.encode(["red"]), [3], [1.0]
        ),
    )
    assert plan.memory["activations of a micro-batch"] == pytest.approx(8 * kept, rel=0.15)


@pytest.mark.parametrize(("dtype", "kept"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_teachers_dtype_is_the_students_unless_it_is_said(dtype, kept, models, tmp_path):
    teacher = {"kind": "flow", "model": models[1], "dtype": dtype}
    student = {"dtype": "bfloat16", "lora": {"rank": 2}}
    recipe = recipe_for(models, tmp_path / "run", teacher=teacher, student=student)
    context = Context(torch.device("cpu"))
    loaded = recipe.teacher[0].build(context, recipe.student.build(context)).model.transformer
    assert {p.dtype for p in loaded.parameters()} == {kept}
    held = sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert make_plan(recipe).memory["teacher 0 weights"] == held


def test_the_recipe_for_the_real_model_is_planned_without_it():
    plan = make_plan(load_recipe("flow_opd_sd3_5_medium"))
    assert plan.models["student"].parameters == pytest.approx(2.25e9, rel=0.05)
    assert plan.models["student"].trainable == pytest.approx(2e7, rel=0.3)
    assert len(plan.models) == 5
    assert any("comes with opd" in note for note in plan.notes)
    expert = make_plan(load_recipe("flow_opd_expert_sd3_5_medium"))
    assert expert.models["student"].trainable == plan.models["student"].trainable


def test_both_branches_of_a_guided_velocity_are_trained(models):
    student = FlowTransformer(model=models[0], guidance=3.0).build(Context(torch.device("cpu")))
    model, weight = student.model, student.model.transformer.proj_out.weight
    with torch.no_grad():
        weight.normal_(std=0.1)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([0.6])
    bound, free = model.encoder.encode(["red circle", ""])

    def gradient(condition, guidance):
        (found,) = torch.autograd.grad(model(x, t, [condition], [1], [guidance]).square().sum() / 2, weight)
        return found

    guided = model(x, t, [bound], [1], [3.0]).detach()

    def pulled(condition):
        (found,) = torch.autograd.grad((model(x, t, [condition], [1], [1.0]) * guided).sum(), weight)
        return found

    torch.testing.assert_close(gradient(bound, 3.0), 3 * pulled(bound) - 2 * pulled(free), rtol=1e-3, atol=1e-4)


def commanded(words, monkeypatch, capsys):
    """Exit code and both outputs of a command."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["taken"], "holds a model already"),
        (["file"], "is a file"),
        (["m", "--heads", "0"], "heads is 0"),
        (["m", "--size", "30"], "multiple of 4"),
        (["m", "--heads", "1", "--head-width", "6"], "give a multiple of 4"),
        (["m", "--tokenizer", "drawings:cont"], "did you mean 'count'"),
    ],
)
def test_a_flow_model_is_created_by_a_command(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    command = ["opd", "create-flow-model", "taken", "--tokenizer", "drawings:glyph", "--size", "16", "--layers", "1"]
    assert commanded(command, monkeypatch, capsys)[:2] == (0, "taken\n")
    model = load_flow_model(FlowTransformer(model="taken"), torch.device("cpu"))
    model.encoder.check("text 4K", 8)
    with pytest.raises(DataError, match="no token"):
        model.encoder.check("red circle", 8)
    code, out, err = commanded(["opd", "create-flow-model", *words], monkeypatch, capsys)
    assert (code, out) == (OpdError.exit_code, "")
    assert message in err
    assert len(err.strip().splitlines()) <= 2


def test_a_diffusers_pipeline_trains_saves_and_draws_in_plain_diffusers(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    models = [str(tmp_path / "pipeline"), str(tmp_path / "other")]
    changes = {"steps": 2, "batch": {"prompts": 2, "group": 1}, "evaluation": {"steps": 2}}
    recipe = recipe_for(models, tmp_path / "run", student={"guidance": 2.0, "lora": {"rank": 2}}, **changes)
    result = execute(recipe, quiet=True)
    loaded = StableDiffusion3Pipeline.from_pretrained(
        result.directory / "student", text_encoder_3=None, tokenizer_3=None
    )
    g = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, 8, 8, generator=g)
    options = {"prompt": "red circle", "num_inference_steps": 2, "guidance_scale": 2.0, "latents": start}
    theirs = loaded(**options, height=8, width=8, output_type="np").images
    student = FlowTransformer(model=str(result.directory / "student"), guidance=2.0).build(Context(torch.device("cpu")))
    model = student.model
    assert model.resolution == 8
    x, times = start, model.grid(2)
    for k in range(2):
        with torch.no_grad():
            velocity = model(x, times[k][None], model.encoder.encode(["red circle"]), [1], [2.0])
        x = step_of(velocity, x, float(times[k]), float(times[k + 1]), 0.0).mean
    np.testing.assert_allclose(model.images(x), theirs, atol=2e-3)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize("of_pixels", [True, False])
def test_a_student_draws_at_the_resolution_that_it_was_trained_at(of_pixels, lora, tmp_path):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    whole = tmp_path / "whole"
    if of_pixels:
        sizes = {"size": 16, "layers": 1, "heads": 2, "head_width": 8, "prompt_width": 16, "places": 4}
        create_flow_model(whole, symbol_tokenizer(WORDS, words=True), **sizes)
    else:
        tiny_pipeline(size=16).save_pretrained(whole)
    changes = {"steps": 1, "batch": {"prompts": 2, "group": 1}, "evaluation": {"steps": 2}}
    student = {"resolution": 8, "lora": lora}
    result = execute(recipe_for([str(whole)] * 2, tmp_path / "run", student=student, **changes), quiet=True)
    folder = result.directory / "student"
    loaded = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert loaded.config.sample_size == 8
    again = load_flow_model(FlowTransformer(model=str(folder)), torch.device("cpu"))
    assert (again.resolution, again.shape[1:]) == (8, (8, 8))
    # Places are cut out of the same table as before.
    x, t = torch.randn(1, again.shape[0], 8, 8), torch.tensor([0.6])
    trained = (
        result.student
        if of_pixels
        else FlowModel(result.student.transformer, result.student.scheduler, again.encoder, again.pipeline)
    )
    velocities = [m(x, t, m.encoder.encode(["red circle"]), [1], [1.0]) for m in (again, trained)]
    torch.testing.assert_close(*velocities, atol=1e-5, rtol=1e-4)
    larger = load_flow_model(FlowTransformer(model=str(folder)), torch.device("cpu"), 16)
    assert larger.resolution == 16
    if not of_pixels:
        plain = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        for pipe in (plain, result.student):
            drawn = pipe("red circle", num_inference_steps=2, guidance_scale=1.0, output_type="np").images
            assert drawn.shape == (1, 8, 8, 3)


def test_what_breaks_off_leaves_a_live_model_as_it_was(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    student = FlowTransformer(model="x", lora={"rank": 2}).live_student(pipe, None, Context(torch.device("cpu")))
    own = pipe.transformer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipe, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        student.save(tmp_path / "full", "")
    assert pipe.transformer is own
    student.module.train()
    source = writing(SDERollout(steps=4), student)
    monkeypatch.setattr(source.source, "_sample", full)
    with pytest.raises(OSError, match="No space"):
        source([Prompt("p", {"prompt": "red circle"})], 1, 3, stream=0)
    assert student.model.training


def test_a_live_teacher_with_the_students_own_weights_is_refused(models, tmp_path):
    own = FlowTransformer(model=models[0]).build(Context(torch.device("cpu"))).model
    settings = block_for(models, tmp_path / "run")
    settings = {k: v for k, v in settings.items() if k not in ("student", "teacher", "prompts")}
    same = FlowModel(own.transformer, own.scheduler, own.encoder)
    for teacher in (own, same):
        with pytest.raises(RunError, match=r"the live student's own weights.*'mode': 'frozen'.*copy\.deepcopy"):
            distill({"model": own, "lora": {"rank": 2}}, teacher, PROMPTS, quiet=True, **settings)
    assert not any("lora_" in name for name, _ in own.named_parameters())
    result = distill(own, copy.deepcopy(own), PROMPTS, quiet=True, **settings)
    assert result.summary["steps"] == 3
    frozen = {"kind": "self", "mode": "frozen"}
    assert distill(own, frozen, PROMPTS, quiet=True, overwrite=True, **settings).summary["steps"] == 3


def test_distill_takes_live_models(models, tmp_path):
    own, other = (FlowTransformer(model=m).build(Context(torch.device("cpu"))).model for m in models)
    before = own.transformer.proj_out.weight.detach().clone()
    settings = block_for(models, tmp_path / "run")
    settings = {k: v for k, v in settings.items() if k not in ("student", "teacher", "prompts")}
    result = distill({"model": own, "guidance": 3.0}, other, PROMPTS, quiet=True, **settings)
    assert result.student is own
    assert not torch.equal(own.transformer.proj_out.weight, before)
    assert yaml.safe_load((result.directory / "recipe.yaml").read_text())["student"]["guidance"] == 3.0
    with pytest.raises(RecipeError, match=r"student\.resolution is 8 beside a live model, which takes guidance, lora"):
        distill({"model": own, "resolution": 8}, other, PROMPTS, **settings)
