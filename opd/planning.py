"""What plans of every modality share: memory counted on the meta device, and numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opd.context import Context
from opd.prompts import Prompt
from opd.prompts.dataset import DatasetPrompts
from opd.recipe import Recipe
from opd.run import check_verdicts, load_data


def saved_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of one call on the meta device, the model's own weights and buffers not counted."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(seen.values())


def prompts_at_hand(recipe: Recipe, notes: list[str]) -> list[Prompt] | None:
    """Training and held-out prompts, checked as a run does; None where they would have to be downloaded."""
    remote = [p.path for p in recipe.prompts if isinstance(p, DatasetPrompts) and not Path(p.path).exists()]
    if remote:
        notes.append(f"{remote[0]}: not read; prompts are taken to be {recipe.max_prompt_tokens} tokens long")
        return None
    training, held_out = load_data(recipe)
    context = Context(device=torch.device("cpu"), temperature=recipe.temperature, seed=recipe.seed, steps=recipe.steps)
    check_verdicts(recipe, None if recipe.verifier is None else recipe.verifier.build(context), training)
    return [*training, *held_out]


def count_text(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(int(value))


def bytes_text(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.1f} MiB"
