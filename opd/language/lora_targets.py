"""Which modules low-rank adapters are added to: not to routers unless they are named, and said in words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from opd.language.experts import Experts, fused
from opd.language.saving import base_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def spare_routers(config: LoraConfig, model: PreTrainedModel) -> None:
    """Leave a mixture's routers out of a `peft` config whose targets are all linear modules: what moves a router moves
    what each expert was trained for. Routers that are named stay targets."""
    routers = Experts(model).routers
    if config.target_modules != "all-linear" or not routers:
        return
    config.exclude_modules = list(routers)
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers,
            get_model_conversion_mapping,
        )
    except ImportError:
        # Before it knew weights that are no linear modules, there was nothing else to leave out.
        return
    # peft does this itself, and again; done here, what it adds for routers can be taken out.
    convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
    weights = [f"{name}.{w}" for name, router in routers.items() for w, _ in router.named_parameters()]
    kept = {
        target
        for target in config.target_parameters or ()
        if not any(weight == target or weight.endswith(f".{target}") for weight in weights)
    }
    config.target_parameters = sorted(kept) or None


def adapted(model: PeftModel) -> str:
    """One sentence about a `peft` model with LoRA: its adapted modules by name, and of a mixture of experts whether
    routers and experts are among them."""
    names: list[str] = []
    kinds: Counter[str] = Counter()
    for name, part in model.named_modules():
        if hasattr(part, "lora_A") and hasattr(part, "base_layer"):
            names.append(name.replace(".base_layer", ""))
            # An adapter of one weight of a module with several stands around the module.
            weight = getattr(part, "parameter_name", None)
            kinds[names[-1].rpartition(".")[2] + (f".{weight}" if weight else "")] += 1
    experts = [name for name in names if "expert" in name]
    told = f"LoRA adapts {len(names)} weights: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    base = base_of(model)
    routers = Experts(base).routers
    if not routers:
        return told
    moved = any(f".{router.replace('.base_layer', '')}" in name for router in routers for name in names)
    told += f"; routers are {'' if moved else 'not '}among them, experts are {'' if experts else 'not'}".rstrip()
    hidden = fused(base)
    return told if experts or not hidden else f"{told} (their weights are one tensor a layer, in {len(hidden)} layers)"
