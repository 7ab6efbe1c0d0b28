"""What low-rank adapters were added to, in words."""

from __future__ import annotations

from collections import Counter
from typing import Any

from opd.language.experts import Experts, fused


def adapted(model: Any) -> str:
    """One sentence about a `peft` model with LoRA: its adapted modules by name, and of a mixture of experts whether
    routers and experts are among them."""
    names = [name for name, part in model.named_modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")]
    counts = Counter(name.rpartition(".")[2] for name in names)
    told = f"LoRA adapts {len(names)} modules: " + ", ".join(f"{count} {name}" for name, count in counts.items())
    base = model.get_base_model()
    routers = Experts(base).routers
    if not routers:
        return told
    moved = any(name.endswith(tuple(f".{router}" for router in routers)) for name in names)
    experts = fused(base)
    told += "; routers are among them" if moved else "; routers are not among them"
    if experts:
        return f"{told}, and experts are not: their weights are one tensor a layer ({len(experts)} layers)"
    return told + (", experts are" if any(".experts." in name for name in names) else ", and neither are experts")
