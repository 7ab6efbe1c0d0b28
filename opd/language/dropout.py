"""Dropout and other noise of training that stands in a model's config."""

from __future__ import annotations

import torch

NOISE = ("drop", "input_jitter_noise")
"""Parts of the names of modules' attributes that are a rate of such noise; `router_jitter_noise` acts without training
too in some families, and `jitter_noise` alone is that of others."""


def silence(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, float]]:
    """Set every rate of noise in `model` to 0, but those of its adapters; its config stays. Returns what was changed,
    for `restore`."""
    changed = []
    for place, part in model.named_modules():
        if "lora_dropout" in place:
            continue
        for name, value in list(vars(part).items()):
            noisy = any(word in name for word in NOISE) or name == "jitter_noise"
            noisy = noisy or (name == "p" and "dropout" in type(part).__name__.lower())
            if noisy and isinstance(value, float) and value != 0.0:
                changed.append((part, name, value))
                setattr(part, name, 0.0)
    return changed


def restore(changed: list[tuple[torch.nn.Module, str, float]]) -> None:
    """Give the modules back what `silence` took."""
    for part, name, value in changed:
        setattr(part, name, value)
