"""Configurations of common public models, so that `opd check` works without a network. They hold no weights."""

from __future__ import annotations

from typing import Any

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
}

R1_DISTILL_QWEN_1_5B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""Also of models that were trained from it."""

SMALL_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16}
LARGE_VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}


def _qwen3_vl(text: dict[str, Any], vision: dict[str, Any], deep: list[int]) -> dict[str, Any]:
    own = {name: value for name, value in QWEN3.items() if name not in ("model_type", "rope_theta", "dtype")}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    own |= {"max_position_embeddings": 262144, "num_hidden_layers": 36, "num_attention_heads": 32}
    return {
        "model_type": "qwen3_vl",
        "text_config": {**own, "rope_parameters": rope, **text},
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": deep},
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": "bfloat16",
    }


def _qwen3_5(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    own = {"vocab_size": 248320, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4}
    own |= {"head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32}
    own |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "max_position_embeddings": 262144}
    return {
        "model_type": "qwen3_5",
        "text_config": {**own, "rope_parameters": {**rope, "partial_rotary_factor": 0.25}, **text},
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": "bfloat16",
    }


IMAGE_TEXT: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(
        {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}, SMALL_VISION, [5, 11, 17]
    ),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(
        {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}, LARGE_VISION, [8, 16, 24]
    ),
    "Qwen/Qwen3.5-4B": _qwen3_5(
        {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True}, SMALL_VISION
    ),
    "Qwen/Qwen3.5-9B": _qwen3_5(
        {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}, LARGE_VISION
    ),
}

KNOWN: dict[str, dict[str, Any]] = (
    {
        f"Qwen/{name}": {**QWEN3, **own}
        for names, own in [
            (
                ("Qwen3-0.6B", "Qwen3-0.6B-Base"),
                {
                    "hidden_size": 1024,
                    "intermediate_size": 3072,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 16,
                    "tie_word_embeddings": True,
                },
            ),
            (
                ("Qwen3-1.7B", "Qwen3-1.7B-Base"),
                {
                    "hidden_size": 2048,
                    "intermediate_size": 6144,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 16,
                    "tie_word_embeddings": True,
                },
            ),
            (
                ("Qwen3-4B", "Qwen3-4B-Base"),
                {
                    "hidden_size": 2560,
                    "intermediate_size": 9728,
                    "num_hidden_layers": 36,
                    "num_attention_heads": 32,
                    "tie_word_embeddings": True,
                },
            ),
            (
                ("Qwen3-8B", "Qwen3-8B-Base"),
                {
                    "hidden_size": 4096,
                    "intermediate_size": 12288,
                    "num_hidden_layers": 36,
                    "num_attention_heads": 32,
                    "tie_word_embeddings": False,
                },
            ),
            (
                ("Qwen3-14B", "Qwen3-14B-Base"),
                {
                    "hidden_size": 5120,
                    "intermediate_size": 17408,
                    "num_hidden_layers": 40,
                    "num_attention_heads": 40,
                    "tie_word_embeddings": False,
                },
            ),
        ]
        for name in names
    }
    | {
        name: {**R1_DISTILL_QWEN_1_5B}
        for name in ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "hbx/JustRL-DeepSeek-1.5B")
    }
    | IMAGE_TEXT
)
