"""An image-text model as the student: full fine-tuning or LoRA, with the part that reads pictures or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from opd.context import Context
from opd.errors import RunError
from opd.language.saving import base_of, is_adapted
from opd.planning import Shape
from opd.policies.causal_lm import IMAGE_TEXT, CausalLMStudent, TrainedModel, freeze
from opd.prompts import Prompt
from opd.prompts.pictures import files_of, is_picture
from opd.prompts.videos import is_video, video_files
from opd.vision.engine import ImageTextModel, of_pictures
from opd.vision.settings import PictureSettings

if TYPE_CHECKING:
    from opd.teachers.local import LanguageTeacher


class ImageText(PictureSettings, TrainedModel):
    """Any `AutoModelForImageTextToText` whose prompts are texts and pictures: Qwen2-VL to Qwen3.5, Idefics3, SmolVLM,
    Gemma 3, LLaVA and their kin."""

    kind: Literal["image_text"] = "image_text"
    teacher: ClassVar[str] = "image_text"
    of_live: ClassVar[tuple[str, ...]] = (
        *TrainedModel.of_live,
        "images",
        "videos",
        "largest_file",
        "largest_picture",
        "vision",
    )
    vision: Literal["trained", "frozen"] = Field(
        "trained",
        description="The part that reads pictures: trained with the rest, or as it is; then each picture is read once",
    )

    def load(self, device: torch.device) -> ImageTextModel:
        return self.engine(device, keep_adapter=self.lora is not None)

    def reader(self, local_only: bool) -> ImageTextModel:
        return self.picture_reader(local_only)

    def spared(self, model: PreTrainedModel) -> list[str]:
        if self.vision == "trained":
            return []
        return sorted({name.rpartition(".")[0] for name, _ in of_pictures(model)})

    def freeze_parts(self, model: torch.nn.Module) -> None:
        if self.vision == "frozen":
            for _, parameter in of_pictures(base_of(model)):  # type: ignore[arg-type]
                parameter.requires_grad_(False)
        freeze(model, self.freeze)

    def shape(self, notes: list[str]) -> Shape:
        found = super().shape(notes)
        notes.append("activations of what reads pictures are not counted; its weights are")
        return found

    def build(self, context: Context) -> CausalLMStudent:
        return _settled(super().build(context))

    def files(self, prompt: Prompt) -> list[Path]:
        values = prompt.fields.values()
        videos = [path for value in values if is_video(value) for path in video_files(value, prompt)]
        pictures = [value for value in values if is_picture(value) and not is_video(value)]
        return [*videos, *(path for value in pictures for path in files_of(value, prompt))]

    def seen(self, prompt: Prompt) -> dict[str, Any]:
        columns = [self.images, None if self.videos is None else self.videos.column]
        return {column: prompt.fields.get(column) for column in columns if column is not None}

    @classmethod
    def takes(cls, model: object) -> bool:
        base: Any = model.get_base_model() if is_adapted(model) else model
        return isinstance(base, PreTrainedModel) and type(base).__name__ in IMAGE_TEXT

    def live_student(
        self, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context
    ) -> CausalLMStudent:
        language = _live(model, tokenizer, context)
        language.pictures = self.pictures
        return _settled(CausalLMStudent(language, self, context))

    @classmethod
    def live_teacher(
        cls, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context
    ) -> LanguageTeacher:
        from opd.policies.base import LIVE
        from opd.teachers.image_text import ImageTextTeacher
        from opd.teachers.local import LanguageTeacher

        language = _live(model, tokenizer, context).requires_grad_(False)
        language.settle()
        return LanguageTeacher(language, ImageTextTeacher(model=LIVE), context.device)


def _settled(student: CausalLMStudent) -> CausalLMStudent:
    assert isinstance(student.language, ImageTextModel)
    student.language.settle()
    return student


def _live(model: Any, processor: Any, context: Context) -> ImageTextModel:
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise RunError(
            "distill() got a live image-text model without its processor; pass tokenizer=processor "
            "(AutoProcessor.from_pretrained)"
        )
    return ImageTextModel(model.to(context.device), processor)
