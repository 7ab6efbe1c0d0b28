"""How an image-text model is loaded, and how its prompts' pictures are found; shared by students and teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from transformers import AutoModelForImageTextToText

from opd.language.model import ModelSettings, load_model, reader_place
from opd.prompts.pictures import Limits
from opd.vision.engine import ImageTextModel, Pictures
from opd.vision.processor import load_processor
from opd.vision.videos import VideoSettings


class PictureSettings(ModelSettings):
    """Settings of models that read pictures."""

    family: ClassVar[Any] = AutoModelForImageTextToText
    template: Literal["chat"] = Field("chat", description="Prompts go through the processor's chat template")
    images: str | None = Field(
        "image",
        description="Column with the prompt's pictures: one or a list of them, each a file's path, encoded bytes, or "
        "from Python uint8 [H, W, 3] or a picture of PIL; null where there are none but in messages",
    )
    videos: VideoSettings | None = Field(
        None,
        description="How videos of prompts are read, e.g. {fps: 2}; default none are, and of a teacher the student's",
    )
    largest_file: int = Field(2**26, ge=1, description="Bytes of a picture's file, at most")
    largest_picture: int = Field(2**26, ge=1, description="Pixels of a picture as it is opened, at most")

    @field_validator("drop_layers")
    @classmethod
    def _whole(cls, value: list[int]) -> list[int]:
        if value:
            raise ValueError("no layers can be dropped of an image-text model; remove the key")
        return value

    @property
    def pictures(self) -> Pictures:
        return Pictures(self.images, Limits(self.largest_file, self.largest_picture), self.videos)

    def engine(self, device: torch.device | str, keep_adapter: bool = False) -> ImageTextModel:
        """The model with its processor."""
        processor = load_processor(self)
        model = load_model(self, device, keep_adapter)
        source = Path(reader_place(self))
        return ImageTextModel(
            model, processor, self.template_options, self.pictures, source if source.is_dir() else None
        )

    def picture_reader(self, local_only: bool) -> ImageTextModel:
        """What it reads with, without its weights."""
        return ImageTextModel(None, load_processor(self, local_only), self.template_options, self.pictures)
