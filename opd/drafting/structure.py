"""What a saved drafter's config may say: what is built here has one structure for each form, and another one would load
without a word wherever it has weights of the same shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from opd.drafting.base import Outline

PLAIN: tuple[str, ...] = (
    "attention_bias",
    "mlp_bias",
    "bias",
    "use_sliding_window",
    "is_causal",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "dflash_config.use_swa",
    "dflash_config.causal",
    "dflash_config.sample_from_anchor",
    "dflash_config.attention_sink_bias",
    "dflash_config.attention_value_scale",
)
"""Parts that other drafters of the two forms have, and none of these: false or left out."""


def other_structure(config: Mapping[str, Any], target: Outline) -> str | None:
    """What a native config says that a drafter which is built for `target` would not be, with what is accepted; None
    where it says nothing of the kind. What it leaves out is taken to be as here."""
    for name, value, accepted in _compared(config, target):
        same = math.isclose(value, accepted, rel_tol=1e-6) if isinstance(accepted, float) else value == accepted
        if not same:
            return f"{name} is {str(value)[:60]}, and drafters of this target have {accepted} here"
    return next(
        (f"{name} is {str(value)[:60]}, and drafters here are without" for name, value in _extra(config) if value), None
    )


def _compared(config: Mapping[str, Any], target: Outline) -> Iterator[tuple[str, Any, Any]]:
    """`(key, what it says, what is accepted)` of the numbers that are the target's here."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    said: dict[str, tuple[Any, Any]] = {
        "num_attention_heads": (config.get("num_attention_heads"), target.heads),
        "num_key_value_heads": (config.get("num_key_value_heads"), target.key_heads),
        "head_dim": (config.get("head_dim"), target.head_dim),
        "rms_norm_eps": (config.get("rms_norm_eps"), target.eps),
        "rope_theta": (rope.get("rope_theta") or config.get("rope_theta"), target.theta),
        "rope_parameters.rope_type": (rope.get("rope_type") or rope.get("type"), "default"),
        "hidden_act": (config.get("hidden_act"), "silu"),
    }
    for name, (value, accepted) in said.items():
        if value is not None:
            yield name, value, accepted
    for kind in config.get("layer_types") or ():
        yield "layer_types", kind, "full_attention"


def _extra(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in PLAIN:
        block, _, key = name.rpartition(".")
        yield name, (config.get(block) or {} if block else config).get(key)
