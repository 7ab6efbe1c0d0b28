"""What a model attends with: the name that a recipe gives it, where it runs, and whether rows meet in it alone."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import re
from contextlib import AbstractContextManager

import torch
from transformers import AttentionInterface, PreTrainedModel

from opd.errors import ModelError
from opd.language.layers import decoder_layers, decoder_of

PACKABLE = {"full_attention", "sliding_attention"}
"""Kinds of layers whose whole mask is the causal one and a window."""
NOT_TOLD = ("nemotron",)
"""Families whose layers keep from their attention what the decoder is called with, such as where rows lie."""
MIXERS = re.compile(
    r"mamba|ssm|recurrent|rwkv|conv(?!ert)|shift|linearattention|lightning|delta|indexer|retention", re.I
)
"""Parts of the names of modules that mix positions by other means than softmax attention."""
PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
"""Modules that these are computed with; where one is not there, transformers takes a kernel of the hub by `kernels`."""


def attention_of(model: PreTrainedModel) -> str:
    """What a model attends with now, as transformers names it."""
    return str(getattr(decoder_of(model).config, "_attn_implementation", None) or "eager")


def takes_lengths(attention: str | None) -> bool:
    """Whether an attention is told the lengths of rows that lie one behind the other, and needs no mask: transformers'
    `flash_attention_2`, `_3`, `_4`, and kernels of the hub with `flash` in their name."""
    return attention is not None and "flash" in attention


def attentions() -> list[str]:
    """The names that a recipe may give, kernels of the hub (`org/name`) aside."""
    known = AttentionInterface().valid_keys()
    return sorted({"eager", *(name for name in known if "|" not in name and not name.startswith("opd_"))})


def check_attention(attention: str | None, key: str, device: torch.device | str) -> None:
    """Raise `ModelError` when what the recipe's `key` names cannot run on the device, or is not installed."""
    if not takes_lengths(attention):
        return
    kind = torch.device(device).type
    if kind == "cpu":
        raise ModelError(f"{key} is {attention!r}, which computes on no CPU; take sdpa there, or hardware.device: cuda")
    if not installed(str(attention)):
        package = PACKAGES[str(attention)].partition(".")[0]
        raise ModelError(
            f"{key} is {attention!r}, and neither {package} nor kernels is installed; install one of them, or take sdpa"
        )


def installed(attention: str) -> bool:
    """Whether this machine has what an attention is computed with; of kernels of the hub nothing is known before."""
    package = PACKAGES.get(attention)
    return package is None or _installed(package) or _installed("kernels")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def check_dtype(attention: str, dtype: torch.dtype, which: str) -> None:
    """Raise `ModelError` when an attention does not compute in this dtype; `which` names the model."""
    if takes_lengths(attention) and dtype not in (torch.bfloat16, torch.float16):
        raise ModelError(
            f"{which}: attention {attention!r} computes in bfloat16 and float16 alone, and is asked in "
            f"{str(dtype).removeprefix('torch.')}; set hardware.precision: bf16 (of who writes dtype or rollout.dtype: "
            "bfloat16), or attention: sdpa"
        )


def in_its_dtype(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Autocast in bfloat16 for a model in float32 whose attention does not compute in that, where nothing is trained:
    measurements are made outside of the run's autocast. Else nothing."""
    if torch.is_grad_enabled() or not takes_lengths(attention_of(model)):
        return contextlib.nullcontext()
    own = next(model.parameters())
    kind = own.device.type
    needed = own.dtype == torch.float32 and not torch.is_autocast_enabled(kind)
    return torch.autocast(kind, torch.bfloat16) if needed else contextlib.nullcontext()


def meets_in_attention(model: PreTrainedModel) -> bool:
    """Whether rows that lie one behind the other meet in softmax attention alone, which is transformers' pluggable
    interface throughout and hears where they lie; nothing else looks from one position to another."""
    body = decoder_of(model)
    config, layers = body.config, decoder_layers(body)
    return (
        config.model_type not in NOT_TOLD
        and bool(layers)
        # A hybrid's layer without attention has the attribute all the same, with nothing in it.
        and all(_is_pluggable(getattr(layer, "self_attn", None)) for layer in layers or ())
        and set(getattr(config, "layer_types", None) or ()) <= PACKABLE
        and not any(_mixes_positions(part) for part in body.modules())
    )


def _is_pluggable(attention: object) -> bool:
    """Whether an attention is a module that asks transformers' interface what to compute with."""
    if not isinstance(attention, torch.nn.Module):
        return False
    code = getattr(inspect.unwrap(type(attention).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _mixes_positions(part: torch.nn.Module) -> bool:
    """Whether a module that is no softmax attention looks from one position to another: a convolution, a recurrence."""
    return isinstance(part, torch.nn.Conv1d) or _names_mixer(type(part).__name__)


@functools.cache
def _names_mixer(name: str) -> bool:
    return MIXERS.search(name) is not None
