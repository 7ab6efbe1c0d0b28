"""What a family does to its logits behind the output head: factors and soft caps, by the names in its config."""

from __future__ import annotations

from transformers import PretrainedConfig

FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES_BY_SCALING = ("hyperclovax",)
"""Families whose `logits_scaling` is a factor."""
UNUSED = {"mpt": ("logit_scale",)}
"""Names that a family's config has and its model does not read."""


def scale_and_softcap(config: PretrainedConfig) -> tuple[float, float | None]:
    """The factor on the logits and the cap `c` of `c * tanh(logits / c)` that a causal model with this config applies.

    A transformation that is not known here shows in the start-up test.
    """
    config = config.get_text_config(decoder=True)
    family = getattr(config, "model_type", "")
    found = {name: getattr(config, name, None) for name in (*FACTORS, *DIVISORS, *SOFT_CAPS)}
    values = {name: float(v) for name, v in found.items() if v and name not in UNUSED.get(family, ())}
    factors = [*FACTORS, *(DIVISORS if family in MULTIPLIES_BY_SCALING else ())]
    scale = 1.0
    for name, value in values.items():
        if name in factors:
            scale *= value
        elif name in DIVISORS:
            scale /= value
    return scale, next((values[name] for name in SOFT_CAPS if name in values), None)
