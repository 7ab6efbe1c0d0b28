"""Causal models of transformers at tiny size, and what `opd` does with each family.

`python -m tests.families` writes the table of docs/models.md from what is said here; tests/test_families.py holds each
row against the family itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

POSITIONS = 64
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
"""Settings that a family gets where its config has them."""

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""Attention with latent keys and values."""
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


HYBRID = ["linear_attention", "full_attention"] * 2
CONVOLUTION = ["conv", "full_attention"] * 2
TEXT = {name: COMMON[name] for name in list(COMMON)[:8] if name != "initializer_range"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """What `opd` does with a family.

    Attributes:
        name: `model_type` of transformers.
        rows: how rows share a batch on a CPU; `refused`: it is neither student nor teacher.
        draws: how it writes: with a cache, or the whole row computed `again` for each token; `refused`: it only scores.
        cut: whether `drop_layers` can take the second layer out of the tiny model.
        table: whether its positions end with a table.
        noisy: whether it draws its experts while training, which cannot be turned off.
        why: part of the message where something is refused.
        config: settings beside `COMMON`; `without` names those of `COMMON` that it does not get.
        label: what the table calls it, where that is not the name.
    """

    name: str
    rows: Literal["packed", "padded", "refused"] = "packed"
    draws: Literal["cache", "again", "refused"] = "cache"
    cut: bool = True
    table: bool = False
    noisy: bool = False
    why: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    label: str = ""


FAMILIES = (
    Family("afmoe"),
    Family("apertus"),
    Family("arcee"),
    Family("aria_text"),
    Family("axk1", config=LATENT, without=("head_dim",)),
    Family("bamba", rows="padded", cut=False, config={**MAMBA, "attn_layer_indices": [1, 3]}),
    Family("beam", cut=False),
    Family("bert", rows="refused", draws="refused", table=True, why="lets a position see the tokens behind it"),
    Family(
        "bert-generation", rows="refused", draws="refused", table=True, why="lets a position see the tokens behind it"
    ),
    Family("biogpt", rows="padded", table=True),
    Family("bitnet"),
    Family("bloom", rows="padded"),
    Family("codegen", rows="padded", table=True, config={"rotary_dim": 4}),
    Family("cohere"),
    Family("cohere2"),
    Family("cohere2_moe"),
    Family("ctrl", rows="padded", cut=False, table=True),
    Family("cwm"),
    Family("deepseek_v2", config=LATENT, without=("head_dim",)),
    Family("deepseek_v3", cut=False, config=LATENT, without=("head_dim",)),
    Family("deepseek_v32", rows="padded", config=LATENT, without=("head_dim",)),
    Family("deepseek_v4", rows="padded", draws="refused", why="cannot run the family"),
    Family("diffllama", cut=False),
    Family("doge"),
    Family("dots1"),
    Family("ernie4_5"),
    Family("ernie4_5_moe"),
    Family("exaone4"),
    Family("exaone_moe"),
    Family("falcon", rows="padded"),
    Family("falcon", rows="padded", config={"alibi": True}, label="falcon with alibi"),
    Family("falcon_h1", rows="padded", config={**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.3}),
    Family("falcon_mamba", rows="padded", config={"state_size": 8}),
    Family("flex_olmo"),
    Family("flint", rows="padded", cut=False),
    Family("gemma"),
    Family("gemma2", rows="padded", config={"final_logit_softcapping": 3.0}),
    Family("gemma3", config={"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4}),
    Family("gemma3_text"),
    Family(
        "gemma3n_text",
        cut=False,
        config={
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "laurel_rank": 8,
            "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    Family(
        "gemma4_text",
        cut=False,
        config={"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    ),
    Family("glm"),
    Family("glm4"),
    Family("glm4_moe"),
    Family("glm4_moe_lite", config=LATENT, without=("head_dim",)),
    Family("glm_moe_dsa", rows="padded", config=LATENT, without=("head_dim",)),
    Family("gpt2", rows="padded", table=True),
    Family("gpt_bigcode", rows="padded", table=True),
    Family(
        "gpt_neo", rows="padded", table=True, config={"attention_types": [[["global", "local"], 2]], "window_size": 6}
    ),
    Family("gpt_neox", rows="padded"),
    Family("gpt_neox_japanese", rows="padded"),
    Family("gpt_oss", rows="padded"),
    Family("gptj", rows="padded", table=True, config={"rotary_dim": 4}),
    Family("granite", config={"logits_scaling": 3.0}),
    Family("granite_swa", rows="padded"),
    Family("granitemoe"),
    Family("granitemoehybrid", rows="padded", config={**MAMBA, "layer_types": HYBRID, "shared_intermediate_size": 64}),
    Family("granitemoeshared"),
    Family("helium"),
    Family("hrm_text", rows="padded", cut=False),
    Family("hunyuan_v1_dense", cut=False),
    Family("hunyuan_v1_moe"),
    Family("hy_v3"),
    Family("hyperclovax", config={"logits_scaling": 3.0}),
    Family("jais2"),
    Family(
        "jamba",
        rows="padded",
        cut=False,
        config={"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    Family("jetmoe", rows="padded"),
    Family("laguna"),
    Family("lfm2", rows="padded", config={"layer_types": CONVOLUTION}),
    Family("lfm2_moe", rows="padded", cut=False, config={"layer_types": CONVOLUTION}),
    Family("llama"),
    Family("llama4_text", rows="padded", cut=False, config={"intermediate_size_mlp": 64}),
    Family("mamba", rows="padded", config={"state_size": 8}),
    Family(
        "mamba2", rows="padded", config={"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8}
    ),
    Family("minicpm3", cut=False, config={**LATENT, "dim_model_base": 8}, without=("head_dim",)),
    Family("minimax", rows="padded", draws="again", cut=False),
    Family("minimax_m2"),
    Family("ministral"),
    Family("ministral3"),
    Family("mistral"),
    Family("mixtral", config={"router_jitter_noise": 0.1}),
    Family(
        "modernbert-decoder", rows="refused", draws="refused", why="changes its logits in a way that opd does not know"
    ),
    Family("mpt", rows="padded"),
    Family("nanochat"),
    Family("nemotron", rows="padded"),
    Family(
        "nemotron_h",
        rows="padded",
        draws="again",
        config={"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    ),
    Family("olmo"),
    Family("olmo2"),
    Family("olmo3"),
    Family("olmo_hybrid", rows="padded", config=DELTA),
    Family("olmoe"),
    Family("openai-gpt", rows="padded", draws="again", table=True),
    Family("opt", table=True, config={"dropout": 0.2, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    Family("persimmon"),
    Family("phi"),
    Family("phi3"),
    Family("phimoe", noisy=True),
    Family("qwen2"),
    Family("qwen2_moe", config={"shared_expert_intermediate_size": 16}),
    Family("qwen3"),
    Family("qwen3_5_moe_text", rows="padded", config={**DELTA, "shared_expert_intermediate_size": 16}),
    Family("qwen3_5_text", rows="padded", config=DELTA),
    Family("qwen3_moe"),
    Family("qwen3_next", rows="padded", config={**DELTA, "shared_expert_intermediate_size": 16}),
    Family("recurrent_gemma", rows="padded", draws="again", cut=False, config={"logits_soft_cap": 3.0}),
    Family("roberta", rows="refused", draws="refused", table=True, why="lets a position see the tokens behind it"),
    Family("rwkv", rows="padded", draws="again"),
    Family("seed_oss", rows="padded"),
    Family("smollm3"),
    Family("solar_open"),
    Family("stablelm", rows="padded"),
    Family("starcoder2"),
    Family("vaultgemma", rows="padded"),
    Family("xglm", rows="padded"),
    Family("xlm", rows="refused", draws="refused", table=True, why="lets a position see the tokens behind it"),
    Family("youtu", config=LATENT, without=("head_dim",)),
    Family(
        "zamba2",
        rows="padded",
        cut=False,
        config={
            "n_mamba_heads": 8,
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_mem_blocks": 1,
        },
    ),
)


def tiny(family: Family) -> Any:
    """A tiny random model of a family, with weights large enough to have opinions."""
    default = AutoConfig.for_model(family.name)
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    settings = {name: value for name, value in COMMON.items() if name in known and name not in family.without}
    if getattr(default, "sliding_window", None) is None:
        settings.pop("sliding_window", None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.name, **{**settings, **family.config}))
    for weight in model.parameters():
        if weight.dim() > 1 and float(weight.detach().std()) < 0.05:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN = "<!-- the table is written by python -m tests.families -->"
ROWS = {"packed": "packed, without padding", "padded": "padded", "refused": "refused"}
NOISY = "; as a student with `dropout: config` only"
DRAWS = {"cache": "with a cache", "again": "whole row again for each token", "refused": "refused"}


def page() -> str:
    """docs/models.md with the table that `FAMILIES` make."""
    head = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    lines = ["| family | scores | writes | `drop_layers` | positions |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        refused = family.rows == "refused"
        cells = [
            family.label or f"`{family.name}`",
            f"refused: {family.why}" if refused else ROWS[family.rows] + (NOISY if family.noisy else ""),
            "refused" if refused else DRAWS[family.draws],
            "" if refused else ("yes" if family.cut else "whole periods, or not"),
            "" if refused else ("a table, which ends" if family.table else "no table"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return head + BEGIN + "\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
