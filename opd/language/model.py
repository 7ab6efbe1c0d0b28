"""How a causal language model and its tokenizer are named in a recipe and loaded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from opd.choice import Settings
from opd.errors import ModelError, first_line
from opd.language.adapters import adapter_of, load_adapter, tokenizer_places
from opd.language.architectures import KNOWN
from opd.language.attention import attentions, takes_lengths
from opd.language.layers import decoder_of, drop_layers, drop_layers_from_config
from opd.language.saving import merged, quantised_by
from opd.language.source import config_source, resolve

MOST_LAYERS = 10_000
"""More than any model has."""
UNRECOGNISED = "Unrecognized configuration class"
"""What transformers says of a model that an auto class of its own does not load."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
OWN = "own"
"""What a teacher says of its tokenizer that is another one than the student's; `own:PLACE` where it lies elsewhere."""


class ModelSettings(Settings):
    """How a model is loaded; shared by students and teachers."""

    family: ClassVar[Any] = AutoModelForCausalLM
    """The auto class of transformers that loads it."""
    model: str = Field(
        description="Hub name or folder, also of an adapter; .gguf file, or package:NAME of a Python package with one"
    )
    tokenizer: str | None = Field(
        None,
        description="Where the tokenizer is, when not beside the model. Of a teacher also own, or own:PLACE: it is "
        "another one than the student's",
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub")
    dtype: Dtype = Field("auto", description="Of the weights; auto: as they are stored")
    attention: str | None = Field(
        None,
        description="attn_implementation of transformers: sdpa, eager, flash_attention_2, ...; default what the family "
        "takes, mostly sdpa",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model")
    drop_layers: list[int] = Field(default=[], description="Layers to remove after loading, e.g. '10-17' or [3, 5]")
    template: Literal["chat", "plain"] = Field("chat", description="Apply the chat template, or encode text as it is")
    template_options: dict[str, Any] = Field(default={}, description="Passed to the chat template (enable_thinking)")

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the tokenizer is said to be another one than the student's."""
        return is_own(self.tokenizer)

    @property
    def tokenizer_place(self) -> str:
        """Where the tokenizer is."""
        return own_place(self.tokenizer) or self.model

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

    @field_validator("attention")
    @classmethod
    def _of_transformers(cls, value: str | None) -> str | None:
        if value is not None and value not in attentions() and "/" not in value:
            raise ValueError(
                f"{value!r} is no attention of transformers; take one of {', '.join(attentions())}, or a kernel of the "
                "hub (org/name)"
            )
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


def is_own(tokenizer: str | None) -> bool:
    """Whether a recipe's word for a tokenizer says that it is the teacher's own."""
    return tokenizer is not None and (tokenizer == OWN or tokenizer.startswith(f"{OWN}:"))


def own_place(tokenizer: str | None) -> str | None:
    """The place that a recipe's word for a tokenizer names; None where it is beside the model."""
    if tokenizer is None or not is_own(tokenizer):
        return tokenizer
    return tokenizer.removeprefix(OWN).removeprefix(":") or None


def load_config(settings: ModelSettings, notes: list[str] | None = None) -> PretrainedConfig:
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
            raise cannot_load("model", settings.model, error) from None
        notes.append(f"{settings.model}: not on this machine; its configuration is the one that comes with opd")
        config = AutoConfig.for_model(known.pop("model_type"), **known)
    return drop_layers_from_config(config, settings.drop_layers)


def reader_place(settings: ModelSettings, local_only: bool = False) -> str:
    """The folder or hub name that a model's tokenizer, and whatever else it reads with, is loaded from."""
    reference = settings.tokenizer_place
    source = adapter_of(reference, settings.revision, local_only)
    if source is not None:
        reference = tokenizer_places(reference, source)[0]
    # A saved adapter's folder has a tokenizer and no model.
    return reference if source is not None and reference != source.base else resolve(reference)


def load_tokenizer(settings: ModelSettings, local_only: bool = False) -> PreTrainedTokenizerBase:
    reference = settings.tokenizer_place
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            reader_place(settings, local_only),
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            local_files_only=local_only,
        )
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("tokenizer", reference, error) from None
    if settings.template == "chat" and not tokenizer.chat_template:
        raise ModelError(
            f"model {settings.model!r}: its tokenizer has no chat template; set template: plain beside it "
            "(student.template, teacher.template), which encodes prompts as text"
        )
    return tokenizer


def load_model(settings: ModelSettings, device: torch.device | str, keep_adapter: bool = False) -> PreTrainedModel:
    """The model in eval mode on `device`, with `drop_layers` applied.

    An adapter's folder loads as the adapter's model with the adapter merged into it; with `keep_adapter`, or where the
    model is quantised, as peft's wrapper around both. On the meta device nothing is read but configurations, and an
    adapter is left out.
    """
    source = adapter_of(settings.model, settings.revision)
    reference = settings.model if source is None else source.base
    if torch.device(device).type == "meta":
        outline: PreTrainedModel = outlined(settings, load_config(settings)).eval()
        with suppress(OSError):  # a model need not say how it writes
            revision = (settings.revision if source is None else None) or "main"
            outline.generation_config = GenerationConfig.from_pretrained(resolve(reference), revision=revision)
        return outline
    named = reference if source is None else f"{reference} (which the adapter {source.folder} changes)"
    try:
        model: Any = settings.family.from_pretrained(
            resolve(reference),
            revision=settings.revision if source is None else None,
            dtype=settings.dtype,
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        other = of_other_kind(settings, load_config(settings)) if UNRECOGNISED in str(error) else None
        raise other or cannot_load("model", named, error) from None
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


def dtype_of(settings: ModelSettings, config: PretrainedConfig) -> str:
    """The name of the dtype of a model's weights once they are loaded."""
    dtype = settings.dtype if settings.dtype != "auto" else str(getattr(config, "dtype", None) or "float32")
    return dtype.removeprefix("torch.")


def outlined(settings: ModelSettings, config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, on the meta device.

    Raises:
        ModelError: transformers makes no causal language model of the configuration.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = settings.family.from_config(
                config,
                dtype=getattr(torch, dtype_of(settings, config), torch.float32),
                # Kernels are not loaded to count weights.
                attn_implementation=None if takes_lengths(settings.attention) else settings.attention,
                trust_remote_code=settings.trust_remote_code,
            )
    except Exception as error:
        # A configuration runs the architecture's own code, which may raise anything about its numbers.
        raise of_other_kind(settings, config) or ModelError(
            f"model {settings.model!r}: transformers makes no causal language model of its config.json "
            f"({first_line(error)}); choose another model, or mend the file"
        ) from None
    if takes_lengths(settings.attention):
        if not model._supports_flash_attn:
            raise ModelError(
                f"model {settings.model!r}: the family {config.model_type!r} has no attention {settings.attention!r} "
                "in transformers; take attention: sdpa, or eager"
            )
        decoder_of(model).config._attn_implementation = settings.attention
    return model


def of_other_kind(settings: ModelSettings, config: PretrainedConfig) -> ModelError | None:
    """Why a model is not loaded that is well: it reads pictures and was taken for one of text, or the other way."""
    kinds: dict[Any, tuple[Any, str]] = {
        AutoModelForCausalLM: (MODEL_FOR_CAUSAL_LM_MAPPING, "text alone; set kind: causal_lm (a teacher: local)"),
        AutoModelForImageTextToText: (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, "pictures too; set kind: image_text"),
    }
    if type(config) in kinds[settings.family][0]:
        return None
    for known, reads in kinds.values():
        if type(config) in known:
            return ModelError(
                f"model {settings.model!r} is of the family {config.model_type!r}, which reads {reads} beside the model"
            )
    return None


def cannot_load(what: str, reference: str, error: Exception) -> ModelError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ModelError(
        f"{what} {reference!r} cannot be loaded ({reason.strip()[:180]}); "
        "give a folder with the files, or a hub name that this machine can reach"
    )
