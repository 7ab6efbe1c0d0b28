"""A teacher in this process that reads pictures: another image-text model with the student's tokenizer."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import field_validator

from opd.context import Context
from opd.hardware import check_device
from opd.language.attention import check_attention
from opd.language.model import is_own
from opd.language.shape import model_shape
from opd.planning import Shape
from opd.policies.base import Student
from opd.teachers.local import LanguageTeacher, ScoringSettings
from opd.vision.settings import PictureSettings


class ImageTextTeacher(PictureSettings, ScoringSettings):
    """Scores the student's completions in one forward pass, under the pictures that it sees itself: `images` names its
    column, and `sees` another text or other pictures."""

    kind: Literal["image_text"] = "image_text"

    @field_validator("tokenizer")
    @classmethod
    def _of_the_student(cls, value: str | None) -> str | None:
        if is_own(value):
            raise ValueError(
                "a teacher that sees pictures reads the student's tokens; remove the key, or take kind local"
            )
        return value

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        return [model_shape(self, notes)]

    def build(self, context: Context, student: Student | None) -> LanguageTeacher:
        check_device(self.device, "teacher.device")
        device = torch.device(self.device) if self.device else context.device
        check_attention(self.attention, "teacher.attention", device)
        language = self.engine("cpu" if self.offload else device)
        language.requires_grad_(False)
        language.settle()
        return LanguageTeacher(language, self, device)
