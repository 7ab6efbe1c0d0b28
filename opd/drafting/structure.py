"""What a saved drafter's config may say: what is built here has one structure for each form, and another one would load
without a word wherever it has weights of the same shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from opd.drafting.base import Outline
from opd.errors import ModelError

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


def check_structure(config: Mapping[str, Any], target: Outline) -> None:
    """Refuse a native config of a drafter that is another than what is built for `target`. What it leaves out is what
    the configs of Llama and Qwen3 take it for.

    Raises:
        ModelError: the first key that says something else, with what is accepted.
    """
    other = _other(config, target)
    if other is not None:
        raise ModelError(f"the drafter is another than can be built here: in its config.json {other}")


def _other(config: Mapping[str, Any], target: Outline) -> str | None:
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
    heads = config.get("num_attention_heads") or target.heads
    yield "num_attention_heads", heads, target.heads
    yield "num_key_value_heads", config.get("num_key_value_heads") or heads, target.key_heads
    yield "head_dim", config.get("head_dim") or target.width // heads, target.head_dim
    yield "rms_norm_eps", config.get("rms_norm_eps") or 1e-6, target.eps
    yield "rope_theta", rope.get("rope_theta") or config.get("rope_theta") or 10_000.0, target.theta
    yield "rope_parameters.rope_type", rope.get("rope_type") or rope.get("type") or "default", "default"
    yield "hidden_act", config.get("hidden_act") or "silu", "silu"
    for kind in config.get("layer_types") or ():
        yield "layer_types", kind, "full_attention"


def _extra(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in PLAIN:
        block, _, key = name.rpartition(".")
        yield name, (config.get(block) or {} if block else config).get(key)
