"""The student as its own teacher: a frozen copy, or an exponential moving average, usually with a better view."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from accelerate.utils import extract_model_from_parallel
from pydantic import Field, ValidationInfo, field_validator

from opd.context import Context
from opd.distributions import Distribution
from opd.language.engines.in_process import InProcess
from opd.planning import Shape
from opd.policies.base import Student
from opd.sharding import full
from opd.teachers.base import LiveTeacher, Teacher
from opd.teachers.local import LanguageTeacher
from opd.weights import copy_into, fingerprint


class SelfTeacher(Teacher):
    """`frozen` keeps the initial weights; `ema` follows: `phi <- (1 - rate) * phi + rate * theta` after each step.

    Only parameters move, buffers stay (Vision-OPD). Give `sees` a column with what the student does not see.
    """

    kind: Literal["self"] = "self"
    mode: Literal["ema", "frozen"] = Field(
        "ema", description="A running mean of the student's weights, or its weights before training"
    )
    rate: float = Field(0.05, gt=0.0, le=1.0, description="Share of the student in the running mean, each step")

    @field_validator("rate")
    @classmethod
    def _of_a_mean(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("mode") == "frozen" and value != cls.model_fields["rate"].default:
            raise ValueError("a frozen teacher does not follow the student; remove the key, or set mode: ema")
        return value

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        return [replace(student, name=f"{student.name} ({self.mode} copy)", trainable=0)]

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [(student, "the teacher")]

    def build(self, context: Context, student: Student) -> LiveTeacher:
        return student.as_teacher(self, context)


class OwnCopy(LiveTeacher[Teacher]):
    """What teachers that are made of the student add to scoring: `module`, the student's as it was, may follow it."""

    settings: SelfTeacher
    module: torch.nn.Module
    moving: list[str]

    def take(self, module: torch.nn.Module, settings: SelfTeacher) -> None:
        """Make `module` this teacher's: in eval mode and without gradients."""
        self.moving = [name for name, p in module.named_parameters() if p.requires_grad and settings.mode == "ema"]
        self.module = module.requires_grad_(False).eval()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that follow the student; none where the teacher is frozen."""
        own = dict(self.module.named_parameters())
        return {name: own[name].detach() for name in self.moving}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        copy_into(self.state_dict(), state, "teacher")

    def fingerprint(self) -> str:
        moving = set(self.moving)
        return fingerprint((name, p) for name, p in self.module.named_parameters() if name not in moving)

    def identity(self) -> str | None:
        return None

    @torch.no_grad()
    def follow(self, student: Student) -> None:
        live = dict(extract_model_from_parallel(student.module).named_parameters())
        for name, mine in self.state_dict().items():
            mine.lerp_(full(live[name].detach()).to(mine.dtype), self.settings.rate)


class SelfLanguageTeacher(OwnCopy, LanguageTeacher):
    """A copy of the student's language model."""

    def __init__(self, language: InProcess, settings: SelfTeacher, device: torch.device):
        self.take(language, settings)
        LanguageTeacher.__init__(self, language, settings, device)
