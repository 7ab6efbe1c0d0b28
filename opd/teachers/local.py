"""A teacher in this process: another causal language model with the student's tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.distributions import Categorical
from opd.language.identity import weights_hash
from opd.language.model import LanguageModel, ModelSettings
from opd.teachers.base import LiveTeacher, Teacher
from opd.trajectories import Trajectories


class LocalTeacher(ModelSettings, Teacher):
    """Scores the student's completions with one forward pass; answers with hidden states and its own head."""

    kind: Literal["local"] = "local"
    device: str | None = Field(None, description="Where it computes; default the student's device")
    offload: bool = Field(False, description="Keep the weights on the CPU and move them over for each batch")

    def build(self, context: Context, student: Any) -> LanguageTeacher:
        device = torch.device(self.device) if self.device else context.device
        language = LanguageModel.load(self, "cpu" if self.offload else device)
        language.requires_grad_(False)
        return LanguageTeacher(language, self, device, context)


class LanguageTeacher(LiveTeacher):
    """A built language teacher; scores hidden states only, so a whole batch's answers take `2 * D` bytes a position."""

    answers = Categorical

    def __init__(self, language: LanguageModel, settings: Teacher, device: torch.device, context: Context):
        self.language, self.settings, self.device, self.context = language, settings, device, context
        self.offload = getattr(settings, "offload", False)

    def identity(self) -> str | None:
        return weights_hash(self.language.model)

    @torch.no_grad()
    def __call__(self, trajectories: Trajectories) -> Categorical:
        if self.offload:
            self.language.to(self.device)
        hidden = []
        for part, _ in trajectories.split(self.settings.batch):
            contexts = [self.language.encode(prompt, self.settings.sees) for prompt in part.prompts]
            hidden.append(self.language(contexts, part.completions()))
        head = self.language.head(self.context.temperature, self.context.vocabulary).detach()
        home = self.context.device
        answer = Categorical(torch.cat(hidden).to(home), replace(head, weight=head.weight.to(home)))
        if self.offload:
            self.language.to("cpu")
        return answer
