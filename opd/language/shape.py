"""The shape of a language model, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from opd.errors import ModelError
from opd.language.model import ModelSettings, dtype_of, load_config, outlined
from opd.planning import DTYPE_BYTES, Shape

if TYPE_CHECKING:
    from peft import PeftModel


def model_shape(
    settings: ModelSettings,
    notes: list[str],
    adapted: Callable[[PreTrainedModel], PreTrainedModel | PeftModel] | None = None,
) -> Shape:
    """The shape of a language model; no weights are read.

    Args:
        notes: gets what a person should know of how it was found out.
        adapted: makes a student's model of it, with its adapters and frozen parts; nothing of others is trained.

    Raises:
        ModelError: transformers makes no causal language model of the configuration.
    """
    config = load_config(settings, notes)
    base = outlined(settings, config)
    model = base if adapted is None else adapted(base)
    parameters = sum(p.numel() for p in model.parameters())
    head = base.get_output_embeddings()
    if head is None:
        raise ModelError(f"model {settings.model!r} has no output embeddings: not a causal language model")
    vocabulary, width = head.weight.shape
    size = DTYPE_BYTES.get(dtype_of(settings, config), 4)
    text = config.get_text_config()
    return Shape(
        name=settings.model,
        parameters=parameters,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad) if adapted else 0,
        width=width,
        vocabulary=vocabulary,
        layers=text.num_hidden_layers,
        kv_bytes_per_token=_kv_width(model, text) * size,
        weight_bytes=parameters * size,
        offload=bool(getattr(settings, "offload", False)),
        model=model,
    )


def _kv_width(model: Any, config: Any) -> int:
    """Numbers that a sampler keeps of each token: keys and values of the layers that attend."""
    found = [
        getattr(part, name).out_features  # an adapted layer has it too
        for part in model.modules()
        for name in ("k_proj", "v_proj")
        if hasattr(getattr(part, name, None), "out_features")
    ]
    if found:
        return sum(found)
    count = getattr(config, "num_attention_heads", None)
    if count is None:  # nothing attends, and a state of one size is kept
        return 0
    heads = getattr(config, "num_key_value_heads", None) or count
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // count
    return int(2 * config.num_hidden_layers * heads * head_dim)
