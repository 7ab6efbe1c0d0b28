"""A trained language model on the disk: weights first, whatever else fails; and whether it is the trained one."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from transformers import GenerationConfig, PreTrainedModel

from opd.errors import ModelError
from opd.files.whole import told
from opd.language.attention import attention_of, in_its_dtype, takes_lengths

if TYPE_CHECKING:
    from peft import PeftModel

PROBE = 24
"""Tokens of the sequence on which a saved model and the live one are compared."""

ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits that is rounding, as a share of the largest logit."""


def is_adapted(model: object) -> TypeGuard[PeftModel]:
    """Whether a model is peft's wrapper around one of transformers."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, without peft's wrapper."""
    # peft says of its base only that it is a module.
    found: Any = model
    return found.get_base_model() if hasattr(found, "get_base_model") else found


def quantised_by(model: PreTrainedModel) -> str | None:
    """The method that a model's weights are quantised by, as transformers names it; None for plain weights."""
    if not getattr(model, "is_quantized", False):
        return None
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    name = str(getattr(method, "value", method))
    if name == "bitsandbytes":
        return f"{name} ({8 if getattr(model, 'is_loaded_in_8bit', False) else 4} bits)"
    return name


def check_savable(model: PreTrainedModel) -> list[str]:
    """What a person should know of how a model will be saved, before it is trained.

    Raises:
        ModelError: its configuration cannot be written.
    """
    try:
        model.config.to_json_string()
    except Exception as error:
        # Anything may stand in a configuration, and raise anything when it is written.
        raise ModelError(
            f"the student's config cannot be saved ({type(error).__name__}: {str(error)[:120]}); take the value out of "
            "model.config before training"
        ) from None
    _, cleared = valid_generation_config(model)
    if cleared:
        return [
            f"the student's generation config is not valid ({', '.join(cleared)} beside do_sample "
            f"{model.generation_config.do_sample}); the student is saved without "
            + ("that value" if len(cleared) == 1 else "those values")
        ]
    return []


def valid_generation_config(model: PreTrainedModel) -> tuple[GenerationConfig | None, list[str]]:
    """A copy that transformers agrees to save, and the names of the values that it lacks for that.

    What transformers refuses is a value without effect under the others (`temperature` without `do_sample`): the model
    generates the same without it.

    Raises:
        ModelError: it cannot be mended so.
    """
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return config, []
    made, cleared = copy.deepcopy(config), list[str]()
    while True:
        try:
            made.validate(strict=True)
            return made, cleared
        except ValueError as error:
            names = [name for name in re.findall(r"`(\w+)`:", str(error)) if name not in cleared]
            if not names:
                raise ModelError(
                    f"the student's generation config cannot be saved ({' '.join(str(error).split())[:160]}); "
                    "mend model.generation_config before training"
                ) from None
        for name in names:
            setattr(made, name, None)
        cleared += names


def write_weights(folder: Path, model: PreTrainedModel, weights: Mapping[str, torch.Tensor] | None = None) -> list[str]:
    """Weights, config and generation config in the format of transformers; a sentence for each part that is lacking.
    `weights` are written in place of the model's own.

    Raises:
        OSError, SafetensorError: the weights cannot be written: the disk.
    """
    own: Any = model
    before = getattr(own, "generation_config", None)
    try:
        own.generation_config = _or_none(model)
        own.save_pretrained(folder, **({} if weights is None else {"state_dict": dict(weights)}))
        return []
    except (OSError, SafetensorError, MemoryError):
        raise
    except Exception as error:
        # Whatever stands in the way of transformers' format, the weights are what cannot be made again.
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(folder / "model.safetensors"))
        return [f"transformers cannot save this model ({told(error)}); model.safetensors holds its state_dict"]
    finally:
        own.generation_config = before


def _or_none(model: PreTrainedModel) -> GenerationConfig | None:
    try:
        return valid_generation_config(model)[0]
    except ModelError:
        return GenerationConfig()


def merged(model: PeftModel, in_place: bool = False) -> PreTrainedModel:
    """An adapted model with the adapters folded in, as the plain model that it amounts to; a copy, unless `in_place`.

    An output head that shares its matrix with the embedding, and of which only one side was trained, is shared no more.
    """
    made: Any = model if in_place else copy.deepcopy(model)
    base = made.get_base_model()
    shared = _tied(base)
    if shared:
        # Folding an adapter into one of the two must not change the other.
        layer = _frozen_layer(base.get_output_embeddings())
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    made = made.merge_and_unload()
    if shared:
        inputs, outputs = made.get_input_embeddings(), made.get_output_embeddings()
        if torch.equal(inputs.weight, outputs.weight):
            outputs.weight = inputs.weight
        tied = outputs.weight is inputs.weight
        for config in (made.config, made.config.get_text_config()):
            config.tie_word_embeddings = tied
        if not tied:
            made.all_tied_weights_keys = {}
    result: PreTrainedModel = made
    return result


def _tied(base: PreTrainedModel) -> bool:
    outputs = base.get_output_embeddings()
    if outputs is None:
        return False
    return _frozen_layer(outputs).weight is _frozen_layer(base.get_input_embeddings()).weight


def _frozen_layer(layer: Any) -> Any:
    """The layer of the base model below what peft put around it."""
    while hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
        layer = layer.base_layer if hasattr(layer, "base_layer") else layer.original_module
    return layer


def free_memory() -> float:
    """Bytes of memory that nobody uses; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def difference_of_adapter(folder: Path, model: PeftModel) -> str | None:
    """How a saved adapter differs from the live one; None where every value is the same."""
    from peft import get_peft_model_state_dict

    stored = load_file(folder / "adapter_model.safetensors")
    live = get_peft_model_state_dict(model)
    for name in dict.fromkeys([*live, *stored]):
        if name not in live or name not in stored or not torch.equal(live[name].cpu(), stored[name]):
            return f"{name} of the adapter in {folder} is not that of the trained model"
    return None


@torch.no_grad()
def difference(
    folder: Path, model: PreTrainedModel | PeftModel, probes: Sequence[Mapping[str, torch.Tensor]] = ()
) -> str | None:
    """How the model that a folder loads as differs from the live one; None when they agree up to rounding.

    The folder is loaded on the CPU as a user would load it, and both models read one sequence of `PROBE` tokens from
    all over the vocabulary, and what `probes` are: whatever goes wrong between training and loading is seen, be it
    merging, tying or names.
    Memory: a second copy of the weights on the CPU; where there is no room for one, a layer at a time is read.
    """
    base = base_of(model)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    options: dict[str, Any] = (
        {} if free_memory() > 1.5 * size else {"device_map": {"": "disk"}, "offload_folder": str(folder)}
    )
    try:
        saved = type(base).from_pretrained(folder, dtype=base.dtype, **options).eval()
    except Exception as error:
        return f"{folder} cannot be loaded again ({told(error)})"
    was_training = model.training
    model.eval()
    try:
        embedding: Any = base.get_input_embeddings()
        rows = int(embedding.weight.shape[0])
        places = getattr(base.config.get_text_config(), "max_position_embeddings", None) or PROBE
        ids = torch.linspace(0, rows - 1, min(PROBE, rows, places)).long()[None]
        found = []
        for given in ({"input_ids": ids}, *probes):
            with in_its_dtype(base):
                live = model(**{name: value.to(base.device) for name, value in given.items()}).logits.float().cpu()
            found.append((live, saved(**{name: value.cpu() for name, value in given.items()}).logits.float()))
    finally:
        model.train(was_training)
    apart = [_apart(folder, base, live, other) for live, other in found]
    return next((sentence for sentence in apart if sentence is not None), None)


def _apart(folder: Path, base: PreTrainedModel, live: torch.Tensor, other: torch.Tensor) -> str | None:
    """How the logits of a saved model differ from those of the `live` one, beyond rounding."""
    if live.shape != other.shape:
        return f"{folder} holds another model than was trained: {other.shape[-1]} logits instead of {live.shape[-1]}"
    if not bool(live.isfinite().all()):
        return f"the trained model's logits are not finite, and so {folder} cannot be compared with it"
    off = float((other - live).abs().max() / live.abs().max().clamp(min=1e-6))
    # Flash attention rounds to bfloat16, and the folder was read without it.
    if not off <= ROUNDING.get(torch.bfloat16 if takes_lengths(attention_of(base)) else base.dtype, 1e-1):
        return f"{folder} holds another model than was trained: its logits differ by {off:.1%} of the largest"
    return None
