"""The student as its own teacher: a frozen copy, or an exponential moving average, usually with a better view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from accelerate.utils import extract_model_from_parallel
from pydantic import Field, ValidationInfo, field_validator

from opd.context import Context
from opd.distributions import Categorical, Distribution, Target
from opd.errors import IncompatibleError
from opd.language.engines.base import Scorer
from opd.language.engines.in_process import InProcess
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.sharding import full
from opd.teachers.base import LiveTeacher, Teacher, answers_whole_texts_alone
from opd.teachers.local import LanguageTeacher
from opd.teachers.showing import ShowingTeacher
from opd.trajectories import Trajectories
from opd.weights import copy_into, fingerprint


class SelfTeacher(ShowingTeacher):
    """`frozen` keeps the initial weights; `ema` follows: `phi <- (1 - rate) * phi + rate * theta` after each step;
    `live` is the student as it is; `trust_region` has the logits `(1 - rate) * z_initial + rate * z_live`.

    Only parameters move, buffers stay (Vision-OPD). Give `sees` a column with what the student does not see,
    or say it in `system` and `examples`.
    """

    kind: Literal["self"] = "self"
    mode: Literal["ema", "frozen", "live", "trust_region"] = Field(
        "ema",
        description="A running mean of the student's weights, its weights before training or as they are, or the mean "
        "of the logits under these two",
    )
    rate: float = Field(
        0.05, gt=0.0, le=1.0, description="Share of the student: in the running mean, each step; in the mean of logits"
    )

    @field_validator("rate")
    @classmethod
    def _of_a_mean(cls, value: float, info: ValidationInfo) -> float:
        mode = info.data.get("mode")
        if mode in ("frozen", "live") and value != cls.model_fields["rate"].default:
            raise ValueError(f"mode: {mode} has no share of the student to set; remove the key, or set mode: ema")
        return value

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        copies = 2 if self.mode == "trust_region" else 1
        return [
            replace(
                student,
                name=f"{student.name} ({self.mode} {'copy' if copies == 1 else 'copies'})",
                trainable=0,
                parameters=copies * student.parameters,
                weight_bytes=copies * student.weight_bytes,
                width=copies * student.width,
            )
        ]

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
        self.moving = [name for name, p in module.named_parameters() if p.requires_grad and settings.mode != "frozen"]
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
            now = full(live[name].detach()).to(mine.dtype)
            if self.settings.mode == "ema":
                mine.lerp_(now, self.settings.rate)
            else:
                mine.copy_(now)


class SelfLanguageTeacher(OwnCopy, LanguageTeacher):
    """A copy of the student's language model."""

    def __init__(self, language: InProcess, settings: SelfTeacher, device: torch.device):
        self.take(language, settings)
        LanguageTeacher.__init__(self, language, settings, device)


class TrustRegionTeacher(SelfLanguageTeacher):
    """Two copies of the student's language model, one as it was and one that is as it is; logits are their mean.

    Logits are products of hidden states and a head's matrix, so their mean is one product: of both states `[N, 2 D]`,
    one behind the other, with both matrices `[V, 2 D]`.
    """

    def __init__(self, language: InProcess, first: InProcess, settings: SelfTeacher, device: torch.device):
        super().__init__(language, settings, device)
        self.first = first.requires_grad_(False).eval()
        self.first.owner = language.owner

    def fingerprint(self) -> str:
        return super().fingerprint() + fingerprint(self.first.named_parameters())

    def check_student(self, student: Student, context: Context) -> None:
        super().check_student(student, context)
        if self.language.head(1.0).softcap is not None:
            raise IncompatibleError(
                f"teacher 'self' with mode: trust_region takes a mean of logits, and {self.language.family} caps its "
                "logits behind the head; take mode: ema or frozen"
            )

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: Teacher, context: Context) -> list[Target]:
        (live,) = super().answer(trajectories, settings, context)
        language = self.language
        try:
            self.language = self.first
            (initial,) = super().answer(trajectories, settings, context)
        finally:
            self.language = language
        return [replace(live, distribution=_mean(initial.distribution, live.distribution, self.settings.rate))]

    def check_scorer(self, context: Context) -> None:
        raise answers_whole_texts_alone(self.settings)

    def scorer(self, prompts: Sequence[Prompt], begun: Sequence[torch.Tensor], context: Context) -> Scorer:
        raise answers_whole_texts_alone(self.settings)


def _mean(first: Distribution, second: Distribution, rate: float) -> Categorical:
    """The distribution of the logits `(1 - rate) * z_first + rate * z_second`."""
    assert isinstance(first, Categorical)
    assert isinstance(second, Categorical)
    a, b = first.head, second.head
    bias = None
    if a.bias is not None and b.bias is not None:
        bias = (1 - rate) * a.bias + rate * b.bias
    head = replace(b, weight=torch.cat([(1 - rate) * a.weight, rate * b.weight], 1), bias=bias)
    return Categorical(torch.cat([first.hidden, second.hidden], 1), head)
