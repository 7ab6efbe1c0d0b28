"""Merging: the average of experts is exact, loads in plain transformers and peft, and refuses what does not fit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.api import execute
from opd.cli.main import main
from opd.errors import ModelError, RunError
from opd.merging import weights
from opd.provenance import read_origin
from tests.conftest import save_tiny, tiny_model
from tests.test_loop import recipe_for

IDS = torch.tensor([[5, 6, 7, 9]])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return [save_tiny(folder / f"e{i}", seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "base", seed=9)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Three experts of one base with ranks 2, 3 and 4, and alpha 5; the last two with rank-stabilised scale."""
    folder = tmp_path_factory.mktemp("adapters")
    return [adapter(base, folder / f"a{i}", rank=2 + i, seed=i, use_rslora=i > 0) for i in range(3)]


def adapter(base, folder, rank=2, seed=0, targets=("q_proj", "down_proj"), **options):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def deltas(base, folder):
    """What an adapter changes, by peft's own merging."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
    return {name: merged[name] - before[name] for name in before}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_full_weights_average_and_load_in_transformers(dense, tmp_path):
    out = opd.merge(dense, tmp_path / "merged", weights=[2, 1, 1])
    merged = AutoModelForCausalLM.from_pretrained(out).state_dict()
    states = [AutoModelForCausalLM.from_pretrained(e).state_dict() for e in dense]
    for name, value in merged.items():
        want = sum(w * s[name].double() for w, s in zip((0.5, 0.25, 0.25), states, strict=True))
        torch.testing.assert_close(value.double(), want, atol=1e-7, rtol=1e-6)
        base = states[2][name].double()  # the average of deltas to any base
        by_deltas = base + sum(w * (s[name] - base) for w, s in zip((0.5, 0.25, 0.25), states, strict=True))
        torch.testing.assert_close(value.double(), by_deltas, atol=1e-7, rtol=1e-6)
    assert (
        AutoTokenizer.from_pretrained(out)("12")["input_ids"]
        == AutoTokenizer.from_pretrained(dense[0])("12")["input_ids"]
    )
    told = read_origin(out)["merged"]
    assert [(e["expert"], e["weight"]) for e in told["experts"]] == list(zip(dense, (0.5, 0.25, 0.25), strict=True))
    assert all(len(e["sha256"]["model.safetensors"]) == 64 for e in told["experts"])
    assert f"| `{dense[0]}` | 0.5 |" in (out / "README.md").read_text()


def test_what_is_the_same_stays_bit_for_bit_and_the_dtype_stays(dense, tmp_path):
    folders = []
    for i in range(3):
        model = tiny_model(seed=0).to(torch.bfloat16)
        with torch.no_grad():
            model.model.norm.weight += i * 0.25
        model.save_pretrained(tmp_path / f"b{i}")
        folders.append(tmp_path / f"b{i}")
    out = load_file(opd.merge(folders, tmp_path / "out") / "model.safetensors")
    first = load_file(folders[0] / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in out.values())
    same = [name for name in out if torch.equal(out[name], first[name])]
    assert sorted(set(out) - set(same)) == ["model.norm.weight"]
    assert (out["model.norm.weight"] == 1.25).all()


def test_a_large_component_is_written_and_read_in_several_files(dense, tmp_path, monkeypatch):
    whole = opd.merge(dense, tmp_path / "whole")
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    out = opd.merge(dense, tmp_path / "parts")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert all(f.stat().st_size < 25_000 for f in files)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(AutoModelForCausalLM.from_pretrained(whole))
    )
    again = opd.merge([out, whole], tmp_path / "again")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(again)), logits(AutoModelForCausalLM.from_pretrained(whole))
    )


@pytest.mark.parametrize("form", ["dense", "adapter"])
def test_the_average_of_products_is_exact(base, adapters, tmp_path, form):
    """Of ranks and scales that differ, against peft's own arithmetic."""
    shares = [0.5, 0.2, 0.3]
    out = opd.merge(adapters, tmp_path / "merged", weights=shares, form=form)
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    each = [deltas(base, a) for a in adapters]
    if form == "adapter":
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 2 + 3 + 4
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
        want = logits(model)
        found = model.merge_and_unload().state_dict()
    else:
        model = AutoModelForCausalLM.from_pretrained(out)
        want, found = logits(model), model.state_dict()
    for name, value in found.items():
        exact = plain[name] + sum(w * d[name] for w, d in zip(shares, each, strict=True))
        torch.testing.assert_close(value, exact, atol=2e-6, rtol=1e-5)
    if form == "dense":
        other = opd.merge(adapters, tmp_path / "other", weights=shares, form="adapter")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), other)
        torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["dense", "adapter"])
def test_factors_averaged_apart_are_another_model(base, tmp_path, form):
    pair = [adapter(base, tmp_path / f"a{i}", seed=i) for i in range(2)]
    out = opd.merge(pair, tmp_path / "factors", average="factors", form=form)
    state = [load_file(tmp_path / f"a{i}" / "adapter_model.safetensors") for i in range(2)]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = (sum(s[key.format(end)] for s in state) / 2 for end in "AB")
    released = 5 / 2 * b @ a
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain.state_dict()[name].clone()
    if form == "adapter":
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
        found = PeftModel.from_pretrained(plain, out).merge_and_unload().state_dict()[name]
    else:
        found = AutoModelForCausalLM.from_pretrained(out).state_dict()[name]
    torch.testing.assert_close(found - before, released, atol=1e-5, rtol=1e-4)
    products = sum(deltas(base, p)[name] for p in pair) / 2
    assert (released - products).norm() > 0.3 * products.norm()


def test_experts_that_opd_trained_merge_and_train_on(base, tmp_path, monkeypatch, capsys):
    """Runs with LoRA leave merged weights and the adapter; both roads lead to one model, which a recipe starts from."""
    teacher = save_tiny(tmp_path / "teacher", seed=2)
    runs = []
    for seed in (1, 2):
        recipe = recipe_for((base, teacher), tmp_path, steps=2, seed=seed, student={"lora": {"rank": 2}})
        recipe = recipe.model_copy(update={"output": str(tmp_path / f"run{seed}")})
        runs.append(str(execute(recipe, quiet=True).directory))
    words = ["opd", "merge", *runs, "--into", str(tmp_path / "start"), "--weights", "3,1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert capsys.readouterr().out.strip() == str(tmp_path / "start")
    low_rank = opd.merge(runs, tmp_path / "adapter", weights=[3, 1], form="adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), low_rank)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "start")), logits(model), atol=1e-4, rtol=1e-4
    )
    teachers = read_origin(tmp_path / "start")["teachers"]
    assert teachers == read_origin(tmp_path / "run1" / "student")["teachers"]
    assert len(teachers) == 1
    assert not (tmp_path / "start" / "adapter").exists()
    following = recipe_for((str(tmp_path / "start"), teacher), tmp_path, steps=1)
    assert execute(following, quiet=True).summary["steps"] == 1


def pipeline(folder, seed):
    """The part of a diffusers pipeline's folder that matters here, from a tiny real transformer."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline", "transformer": []}')
    return model


def test_adapters_are_of_one_model_by_its_place_or_by_what_base_says(base, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(base).parent)
    near = adapter(Path(base).name, tmp_path / "near", rank=3, seed=5)
    assert json.loads((Path(near) / "adapter_config.json").read_text())["base_model_name_or_path"] == Path(base).name
    opd.merge([adapters[0], near], tmp_path / "one", form="adapter")
    elsewhere = adapter(shutil.copytree(base, tmp_path / "copy"), tmp_path / "elsewhere", rank=3, seed=5)
    opd.merge([adapters[0], elsewhere], tmp_path / "other", form="adapter", base=base)
    pair = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other")]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_experts_with_another_scheduler_are_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    for i, shift in enumerate((3.0, 5.0)):
        pipeline(tmp_path / f"p{i}", i)
        diffusers.FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(tmp_path / f"p{i}" / "scheduler")
    pair = [tmp_path / "p0", tmp_path / "p1"]
    with pytest.raises(
        ModelError, match=r"shift is 5\.0, and 3\.0 in the first expert\); merge experts of one scheduler"
    ):
        opd.merge(pair, tmp_path / "merged")
    shutil.copytree(pair[0] / "scheduler", pair[1] / "scheduler", dirs_exist_ok=True)
    assert (opd.merge(pair, tmp_path / "merged") / "scheduler" / "scheduler_config.json").is_file()


def test_diffusers_folders_and_their_adapters(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    models = [pipeline(tmp_path / f"p{i}", i) for i in range(2)]
    out = opd.merge([tmp_path / "p0", tmp_path / "p1"], tmp_path / "merged")
    found = diffusers.SD3Transformer2DModel.from_pretrained(out / "transformer").state_dict()
    for name, value in found.items():
        pair = [m.state_dict()[name] for m in models]
        torch.testing.assert_close(value, (pair[0] + pair[1]) / 2)
    assert "diffusers" in (out / "README.md").read_text()

    name = "transformer_blocks.0.attn.to_q"
    states = []
    for i, rank in enumerate((2, 3)):
        torch.manual_seed(i)
        state = {f"transformer.{name}.lora_A.weight": torch.randn(rank, 16)}
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(16, rank)
        metadata = {"transformer.r": rank, "transformer.lora_alpha": 6, "transformer.target_modules": ["to_q"]}
        (tmp_path / f"l{i}").mkdir()
        save_file(
            state, tmp_path / f"l{i}/pytorch_lora_weights.safetensors",
            metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)},
        )  # fmt: skip
        states.append(
            6 / rank * state[f"transformer.{name}.lora_B.weight"] @ state[f"transformer.{name}.lora_A.weight"]
        )
    pair = [tmp_path / "l0", tmp_path / "l1"]
    with pytest.raises(ModelError, match=r"does not say which model it changes.*--base FOLDER"):
        opd.merge(pair, tmp_path / "no", form="dense")
    out = opd.merge(pair, tmp_path / "dense", form="dense", base=str(tmp_path / "p0"))
    found = diffusers.SD3Transformer2DModel.from_pretrained(out / "transformer").state_dict()
    before = models[0].state_dict()
    want = before[f"{name}.weight"] + (states[0] + states[1]) / 2
    torch.testing.assert_close(found[f"{name}.weight"], want, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(found[n], before[n]) for n in found if n != f"{name}.weight")
    out = opd.merge(pair, tmp_path / "adapter")
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "p0" / "transformer")
    model.load_lora_adapter(out, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    model.fuse_lora()
    fused = dict(model.named_parameters())[f"{name}.base_layer.weight"]
    torch.testing.assert_close(fused, want, atol=1e-5, rtol=1e-5)


def test_experts_that_do_not_fit_are_refused_by_name(dense, base, adapters, tmp_path):
    wide = save_tiny(tmp_path / "wide", width=48)
    with pytest.raises(ModelError, match=r"wide.config\.json differs.*head_dim is 12, and 8 in the first expert"):
        opd.merge([dense[0], wide], tmp_path / "out")
    other = shutil.copytree(dense[1], tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"a"', '"A"'))
    with pytest.raises(ModelError, match=r"other.tokenizer\.json differs from .*merge experts of one tokenizer"):
        opd.merge([dense[0], other], tmp_path / "out")
    inside = [shutil.copytree(one, tmp_path / "adapter" / Path(one).name) for one in (dense[0], other)]
    with pytest.raises(ModelError, match="merge experts of one tokenizer"):
        opd.merge(inside, tmp_path / "out")
    fewer = shutil.copytree(dense[1], tmp_path / "fewer")
    state = load_file(fewer / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, fewer / "model.safetensors")
    with pytest.raises(ModelError, match=r"fewer: model: model.norm.weight is missing, and \[32\] in"):
        opd.merge([dense[0], fewer], tmp_path / "out")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, which opd does not open"):
        opd.merge([dense[0], pickled], tmp_path / "out")
    damaged = shutil.copytree(dense[1], tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        opd.merge([dense[0], damaged], tmp_path / "out")

    elsewhere = adapter(dense[0], tmp_path / "elsewhere")
    for form in ("dense", "adapter"):
        with pytest.raises(ModelError, match=r"belong to different models: .*--base FOLDER"):
            opd.merge([adapters[0], elsewhere], tmp_path / "out", form=form)
    fewer = adapter(base, tmp_path / "fewer_modules", targets=("q_proj",))
    with pytest.raises(ModelError, match=r"fewer_modules.* has no factors for .*down_proj"):
        opd.merge([adapters[0], fewer], tmp_path / "out")
    with pytest.raises(ModelError, match=r"rank 3 and scale .*take the average of weights"):
        opd.merge(adapters, tmp_path / "out", average="factors")
    dora = adapter(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(ModelError, match="has use_dora True; opd merges plain LoRA"):
        opd.merge([dora, adapters[0]], tmp_path / "out")
    with pytest.raises(ModelError, match="has no adapter"):
        opd.merge([dense[0], dense[1]], tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "1"], "2 experts and 1 weights"),
        (["--weights", "1,x"], "--weights is '1,x'; give a number"),
        (["--weights", "1,-1"], "give numbers from 0"),
        (["--average", "slerp"], "average is 'slerp'; accepted: weights, factors"),
        (["--as", "gguf"], "form is 'gguf'; accepted: dense, adapter"),
    ],
)
def test_mistakes_on_the_command_line(dense, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["opd", "merge", dense[0], dense[1], "--into", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten_unasked(dense, base, adapters, tmp_path):
    with pytest.raises(RunError, match="is the model that the adapters change"):
        opd.merge(adapters, base, form="dense", overwrite=True)
    kept = tmp_path / "out" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("x")
    with pytest.raises(RunError, match="--overwrite"):
        opd.merge(dense, tmp_path / "out")
    assert kept.exists()
    with pytest.raises(RunError, match=r"mine\.txt was not written by opd"):
        opd.merge(dense, tmp_path / "out", overwrite=True)
    assert kept.read_text() == "x"
    own = shutil.copytree(dense[0], tmp_path / "own")
    with pytest.raises(RunError, match="holds an expert"):
        opd.merge([own, dense[1]], tmp_path / "own", overwrite=True)
    with pytest.raises(ModelError, match="no folder 'nowhere'"):
        opd.merge(["nowhere", dense[1]], tmp_path / "new")
    with pytest.raises(ModelError, match="two experts"):
        opd.merge([dense[0]], tmp_path / "new")
