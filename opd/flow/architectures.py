"""Configurations of common public models, so that `opd check` works without a network. They hold no weights."""

from __future__ import annotations

from typing import Any

KNOWN: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-3.5-medium": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    },
}

FACTOR = 8
"""Pixels on the side of a latent's place, in pipelines with a VAE."""

PROMPT_TOKENS = 77 + 256
"""Places that the text encoders of Stable Diffusion 3 give a prompt."""
