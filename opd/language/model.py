"""A causal language model with its tokenizer: prompts to ids, ids to final hidden states, and the output head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opd.choice import Settings
from opd.distributions import EVERY_ID, Head, Vocabulary
from opd.errors import ModelError
from opd.language.adapters import adapter_of, load_adapter, tokenizer_places
from opd.language.architectures import KNOWN
from opd.language.encoding import encode
from opd.language.layers import decoder_of, drop_layers, drop_layers_from_config
from opd.language.logits import scale_and_softcap
from opd.language.packing import ATTENTION, Layout, can_pack, pack
from opd.language.saving import merged, quantised_by
from opd.language.source import config_source, resolve
from opd.prompts import Prompt

MOST_LAYERS = 10_000
"""More than any model has."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSettings(Settings):
    """How a model is loaded; shared by students and teachers."""

    model: str = Field(
        description="Hub name or folder, also of an adapter; .gguf file, or package:NAME of a Python package with one"
    )
    tokenizer: str | None = Field(None, description="Where the tokenizer is, when not beside the model")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub")
    dtype: Dtype = Field("auto", description="Of the weights; auto: as they are stored")
    attention: str | None = Field(None, description="attn_implementation of transformers: sdpa, eager, ...")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model")
    drop_layers: list[int] = Field(default=[], description="Layers to remove after loading, e.g. '10-17' or [3, 5]")
    template: Literal["chat", "plain"] = Field("chat", description="Apply the chat template, or encode text as it is")
    template_options: dict[str, Any] = Field(default={}, description="Passed to the chat template (enable_thinking)")

    @field_validator("drop_layers", mode="before")
    @classmethod
    def _ranges(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return [value]
        if isinstance(value, str):
            layers: list[int] = []
            for part in value.split(","):
                first, _, last = part.strip().partition("-")
                if not first.isdecimal() or (last and not last.isdecimal()):
                    raise ValueError(f"{value!r} is not a list of layers like '10-17' or '3,5'")
                start, end = int(first), int(last or first)
                if not start <= end < MOST_LAYERS:
                    raise ValueError(f"{part.strip()!r} is no range of layers; give the smaller number first, from 0")
                layers += range(start, end + 1)
            return layers
        return value

    @field_validator("revision")
    @classmethod
    def _of_a_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        model = str(info.data.get("model"))
        if value is not None and (model.startswith("package:") or Path(model).expanduser().exists()):
            raise ValueError(f"model {model!r} is not on the hub and has no revisions; remove the key")
        return value

    @field_validator("template_options")
    @classmethod
    def _for_a_template(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("template") == "plain":
            raise ValueError("template: plain applies no template, which could take options; remove the key")
        return value

    @field_validator("drop_layers")
    @classmethod
    def _numbers_of_layers(cls, value: list[int]) -> list[int]:
        if wrong := [layer for layer in value if not 0 <= layer < MOST_LAYERS]:
            raise ValueError(f"{wrong[0]} is no layer; they are counted from 0")
        return value


def load_config(settings: ModelSettings, notes: list[str] | None = None) -> Any:
    """The architecture's config, without weights. With `notes`, a hub name that this machine has no copy of is looked
    up first in the configurations that come with `opd`; the notes say so."""
    source = adapter_of(settings.model, settings.revision, local_only=notes is not None)
    if source is not None:
        settings = settings.model_copy(update={"model": source.base, "revision": None})
    reference, options = config_source(settings.model)
    known = dict(KNOWN.get(settings.model, {})) if notes is not None else {}
    try:
        config = AutoConfig.from_pretrained(
            reference,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            local_files_only=bool(known),
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        if notes is None or not known:
            raise _cannot_load("model", settings.model, error) from None
        notes.append(f"{settings.model}: not on this machine; its configuration is the one that comes with opd")
        config = AutoConfig.for_model(known.pop("model_type"), **known)
    return drop_layers_from_config(config, settings.drop_layers)


def load_tokenizer(settings: ModelSettings, local_only: bool = False) -> PreTrainedTokenizerBase:
    reference = settings.tokenizer or settings.model
    source = adapter_of(reference, settings.revision, local_only)
    if source is not None:
        reference = tokenizer_places(reference, source)[0]
    # A saved adapter's folder has a tokenizer and no model.
    alone = source is not None and reference != source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            reference if alone else resolve(reference),
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            local_files_only=local_only,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("tokenizer", reference, error) from None
    if settings.template == "chat" and not tokenizer.chat_template:
        raise ModelError(
            f"model {settings.model!r}: its tokenizer has no chat template; template: plain encodes prompts as text"
        )
    return tokenizer


def load_model(settings: ModelSettings, device: torch.device | str, keep_adapter: bool = False) -> PreTrainedModel:
    """The model in eval mode on `device`, with `drop_layers` applied.

    An adapter's folder loads as the adapter's model with the adapter merged into it; with `keep_adapter`, or where the
    model is quantised, as peft's wrapper around both.
    """
    source = adapter_of(settings.model, settings.revision)
    reference = settings.model if source is None else source.base
    named = reference if source is None else f"{reference} (which the adapter {source.folder} changes)"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve(reference),
            revision=settings.revision if source is None else None,
            dtype=settings.dtype,
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load("model", named, error) from None
    if source is not None:
        model = load_adapter(model, source)
        if not keep_adapter and quantised_by(model.get_base_model()) is None:
            model = merged(model, in_place=True).requires_grad_(True)
        elif settings.drop_layers:
            raise ModelError(
                f"drop_layers does not go with the adapter {source.folder}, which is kept as it is; merge it"
            )
    drop_layers(model, settings.drop_layers)
    return model.to(device).eval()


def _cannot_load(what: str, reference: str, error: Exception) -> ModelError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ModelError(
        f"{what} {reference!r} cannot be loaded ({reason.strip()[:180]}); "
        "give a folder with the files, or a hub name that this machine can reach"
    )


class LanguageModel(torch.nn.Module):
    """A transformers causal LM seen as `hidden states + head`; what policies, teachers and samplers share."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "chat",
        template_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.template_options = template_options or {}
        self.owner = "the model"
        """Who this model is in the run, as messages name it."""
        self.notes: list[str] = []
        """What was changed on the way to ids, or could not be handed on; each sentence once."""

    @classmethod
    def load(cls, settings: ModelSettings, device: torch.device | str, keep_adapter: bool = False) -> LanguageModel:
        tokenizer = load_tokenizer(settings)
        return cls(load_model(settings, device, keep_adapter), tokenizer, settings.template, settings.template_options)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without a peft wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of decoder layers, by which `accelerate` cuts a model into groups."""
        present = {type(part).__name__ for part in self.base.modules()}
        return sorted(present & set(self.base._no_split_modules or ()))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, prompt: Prompt, column: str | None = None) -> torch.Tensor:
        """int64 `[P]` ids of a prompt's view, up to where the completion starts; see `opd.language.encoding`."""
        return torch.tensor(encode(self, prompt, column), dtype=torch.int64)

    def say(self, note: str) -> None:
        """Add a sentence to `notes`, unless it is there."""
        if note not in self.notes:
            self.notes.append(note)

    def decode(self, ids: torch.Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def head(self, temperature: float, vocabulary: Vocabulary = EVERY_ID) -> Head:
        """The output head over these ids as it is now, with a graph where its parameters are trained."""
        layer = self.base.get_output_embeddings()
        if layer is None:
            raise ModelError(f"model {self.base.config.name_or_path!r} has no output embeddings: not a causal LM")
        scale, softcap = scale_and_softcap(self.base.config)
        whole = Head(
            _effective_weight(layer),
            getattr(layer, "bias", None),
            scale=scale,
            softcap=softcap,
            temperature=temperature,
        )
        return whole.over(vocabulary, self.owner)

    def body(self, **inputs: Any) -> Any:
        """The decoder without the head: `last_hidden_state` is final-normed."""
        return decoder_of(self.base)(**inputs)

    def forward(
        self,
        contexts: Sequence[torch.Tensor],
        completions: Sequence[torch.Tensor],
        layout: Literal["auto", "packed", "right", "left"] = "auto",
    ) -> torch.Tensor:
        """Final hidden states `[N, D]` of the positions that predict the completions' tokens, packed in order.

        Args:
            contexts: B prompts, int64 `[P_i]`; neighbours with the same prompt may be computed once.
            completions: B completions, int64 `[T_i]`; position t of a completion is predicted from the state before it.
            layout: one packed row, or a batch padded on either side; the result does not depend on it.
        """
        if layout == "auto":
            layout = "packed" if can_pack(self.base) else "right"
        if layout == "packed":
            return self._packed(contexts, completions)
        # The last token of a completion predicts nothing that is scored, so it is not fed.
        rows = [torch.cat([c.cpu(), y[:-1].cpu()]) for c, y in zip(contexts, completions, strict=True)]
        ids, mask = pad(rows, layout)
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        attention = None if bool(mask.all()) else mask
        hidden = self.body(
            input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False
        ).last_hidden_state
        scored = torch.zeros_like(mask, dtype=torch.bool)
        for i, (context, row) in enumerate(zip(contexts, rows, strict=True)):
            shift = ids.shape[1] - len(row) if layout == "left" else 0
            scored[i, shift + len(context) - 1 : shift + len(row)] = True
        return hidden[scored]

    def padding(
        self, contexts: Sequence[torch.Tensor], completions: Sequence[torch.Tensor], layout: str = "auto"
    ) -> torch.Tensor | None:
        """int64 `[B, L]`, 1 where `forward` is fed a token of these rows and 0 where padding; None without padding."""
        if layout == "packed" or (layout == "auto" and can_pack(self.base)):
            return None
        fed = [torch.ones(len(c) + len(y) - 1) for c, y in zip(contexts, completions, strict=True)]
        return pad(fed, "left" if layout == "left" else "right")[1].to(self.device)

    def _packed(self, contexts: Sequence[torch.Tensor], completions: Sequence[torch.Tensor]) -> torch.Tensor:
        row = pack(contexts, completions).to(self.device)
        return self.packed_body(row)[0, row.scored]

    def packed_body(self, row: Layout, **options: Any) -> torch.Tensor:
        """Final hidden states `[1, L, D]` of a packed row."""
        decoder_of(self.base).config._attn_implementation = ATTENTION
        # A mask that is already four-dimensional is passed through; packed attention makes its own.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        hidden = self.body(
            input_ids=row.ids,
            attention_mask=nothing,
            position_ids=row.positions,
            opd_layout=row,
            **{"use_cache": False, **options},
        ).last_hidden_state
        if not row.read.is_set():
            raise ModelError(
                f"the family {self.base.config.model_type!r} does not tell its attention where rows that share a batch "
                "lie; set attention: eager"
            )
        return hidden


def pad(rows: Sequence[torch.Tensor], side: Literal["right", "left"]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, L]` ids and int64 mask. The filler id is 0; only the mask says what is padding."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return ids, mask


def _effective_weight(layer: Any) -> torch.Tensor:
    """The head's matrix `[V, D]`; for a LoRA-adapted head the base plus the active adapters' product."""
    if not hasattr(layer, "lora_A"):
        return layer.weight
    weight = layer.base_layer.weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            product = layer.lora_B[name].weight @ layer.lora_A[name].weight
            weight = weight + layer.scaling[name] * product.to(weight.dtype)
    return weight
