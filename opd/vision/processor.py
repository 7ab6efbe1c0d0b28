"""A processor of `transformers`: from a text with pictures to the ids and tensors that a model takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from opd.errors import ModelError
from opd.language.model import ModelSettings, cannot_load, reader_place

FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a processor is saved as, its tokenizer aside."""
PARTS = ("image", "video", "vision", "audio", "boi", "eoi", "fake_token", "global_image")
"""Parts of the names under which configs and processors keep the ids of tokens that stand for no text."""


def load_processor(settings: ModelSettings, local_only: bool = False) -> ProcessorMixin:
    """The processor beside a model, or where `tokenizer` says, with a chat template.

    Raises:
        ModelError: there is none, or none that reads pictures.
    """
    place = reader_place(settings, local_only)
    options: dict[str, Any] = {
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "local_files_only": local_only,
    }
    named = settings.tokenizer or settings.model
    try:
        try:
            found = AutoProcessor.from_pretrained(place, **options)
        except (ImportError, OSError, ValueError) as error:
            # Nobody reads videos here, and what reads them may be missing: torchvision, or a file that configures it.
            if not any(word in str(error).lower() for word in ("torchvision", "video")):
                raise
            found = _without_video(place, options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise cannot_load("processor", named, error) from None
    if not isinstance(found, ProcessorMixin) or getattr(found, "image_processor", None) is None:
        raise ModelError(
            f"model {settings.model!r} has no processor that reads pictures; take student.kind causal_lm for a model "
            "of text, or name the processor's place with tokenizer"
        )
    return found


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """A processor's tokenizer, with the processor's chat template.

    Raises:
        ModelError: neither has one.
    """
    found: Any = processor
    template = getattr(found, "chat_template", None) or found.tokenizer.chat_template
    if not template:
        raise ModelError(
            "the processor has no chat template, which says where pictures stand; take a model with one, or put a "
            "chat_template.jinja beside it"
        )
    found.tokenizer.chat_template = template
    tokenizer: PreTrainedTokenizerBase = found.tokenizer
    return tokenizer


def _without_video(place: str, options: dict[str, Any]) -> ProcessorMixin:
    """A processor without its reader of videos."""
    config = AutoConfig.from_pretrained(place, **options)
    kind: Any = PROCESSOR_MAPPING[type(config)]
    return _reader_of_pictures(kind).from_pretrained(place, **options)


def _reader_of_pictures(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A subclass of a processor's class that is made of a tokenizer and a processor of images alone, by the same
    name."""

    def attributes(cls: type[ProcessorMixin]) -> list[str]:
        return [name for name in kind.get_attributes() if "video" not in name]

    return type(kind.__name__, (kind,), {"get_attributes": classmethod(attributes), "__module__": kind.__module__})


def picture_reader(
    kind: type[ProcessorMixin],
    image_processor: ImageProcessingMixin,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
) -> ProcessorMixin:
    """A processor of the class `kind` from its parts, without its reader of videos where it has one."""
    made: ProcessorMixin = _reader_of_pictures(kind)(
        image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template
    )
    return made


def save_processor(folder: Path, processor: ProcessorMixin, source: Path | None) -> None:
    """Write a processor beside a model: its own files as they are, where they lie in the folder `source`."""
    processor.save_pretrained(str(folder))
    if source is None or source == folder:
        return
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def placeholders_of(config: PretrainedConfig | None, processor: ProcessorMixin) -> tuple[int, ...]:
    """Ids of tokens that stand for pictures, videos or sound, or for where one begins and ends, in order."""
    found = {
        value for part in (config, processor, tokenizer_of(processor)) if part is not None for value in _ids_of(part)
    }
    tokenizer = tokenizer_of(processor)
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    return tuple(sorted(found - ends))


def _ids_of(part: object) -> Iterator[int]:
    for name, value in vars(part).items():
        if any(mark in name for mark in PARTS) and name.endswith(("token_id", "token_index")) and type(value) is int:
            yield value
    for name in ("image_token_id", "video_token_id", "boi_token_id", "eoi_token_id"):
        value = getattr(part, name, None)
        if type(value) is int:
            yield value
