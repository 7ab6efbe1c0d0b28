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

KNOWN: dict[str, dict[str, Any]] = {
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
    ]
    for name in names
} | {
    name: {**R1_DISTILL_QWEN_1_5B} for name in ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "hbx/JustRL-DeepSeek-1.5B")
}
