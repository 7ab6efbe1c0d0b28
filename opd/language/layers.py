"""A decoder's layers, whatever its family calls them, and taking some of them out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from opd.errors import ModelError


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal model below its head: what `get_decoder` says, or its base where that is no decoder."""
    found = model.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not model:
        return found
    base = getattr(model, model.base_model_prefix, None)
    return base if isinstance(base, PreTrainedModel) else getattr(model, "model", found)


def decoder_layers(body: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The list that holds a decoder's layers (`layers`, `h`, `blocks`, ...): the outermost of the config's length."""
    count = getattr(body.config, "num_hidden_layers", None)
    lists = (part for part in body.modules() if isinstance(part, torch.nn.ModuleList))
    return next((part for part in lists if len(part) == count), None)


def drop_layers_from_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The config of the model that is left after removing `layers`."""
    if not layers:
        return config
    text = config.get_text_config(decoder=True)
    count = text.num_hidden_layers
    outside = sorted(i for i in layers if i >= count)
    if outside or len(set(layers)) >= count:
        raise ModelError(f"drop_layers names layers {outside or sorted(set(layers))}; the model has 0 to {count - 1}")
    kept = [i for i in range(count) if i not in set(layers)]
    for name, value in list(vars(text).items()):
        # What is listed layer by layer: layer_types, no_rope_layers, mlp_layer_types, ...
        if isinstance(value, list) and len(value) == count and not name.startswith("_"):
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    return config


def drop_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Remove decoder layers in place; what is left is renumbered, so that it saves and caches as a normal model.

    Raises:
        ModelError: layers that the model has not, or a family whose config cannot say which layers are left.
    """
    if not layers:
        return
    decoder = decoder_of(model)
    present = decoder_layers(decoder)
    if present is None:
        raise ModelError(f"drop_layers: opd finds no layers in the family {model.config.model_type!r}; leave it out")
    kept = [layer for i, layer in enumerate(present) if i not in set(layers)]
    drop_layers_from_config(model.config, layers)
    del present[:]
    present.extend(kept)
    for index, layer in enumerate(kept):
        for part in layer.modules():
            for name in ("layer_idx", "layer_id", "layer_number"):
                if hasattr(part, name):
                    setattr(part, name, index)
    _check_config_tells(model, layers)


def _check_config_tells(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Refuse a cut after which the saved config would load as another model: every fourth layer attends, the first two
    are dense, and the like."""
    try:
        config = type(model.config).from_dict(copy.deepcopy(model.config).to_dict())
        config._attn_implementation = model.config._attn_implementation
        with torch.device("meta"):
            told = _structure(type(model)(config))
        different = _first_difference(_structure(model), told)
    except Exception as error:
        # Families check their configs each in its own way.
        different = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
    if different is not None:
        raise ModelError(
            f"drop_layers {sorted(set(layers))}: the config of the family {model.config.model_type!r} cannot say which "
            f"layers are left ({different}); drop a whole period of its layers, or none"
        )


def _structure(model: torch.nn.Module) -> dict[str, Any]:
    """Every module's class and plain attributes, and every tensor's shape, by name."""
    plain: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, part in model.named_modules():
        plain[f"{name} class"] = type(part).__name__
        for key, value in vars(part).items():
            if isinstance(value, int | float | str) and key != "training" and not key.startswith("_"):
                plain[f"{name}.{key}"] = value
    return plain


def _first_difference(found: dict[str, Any], told: dict[str, Any]) -> str | None:
    for name in [*found, *told]:
        if found.get(name) != told.get(name):
            return f"{name.lstrip('.')} is {found.get(name)!r} here and {told.get(name)!r} by the config"
    return None
