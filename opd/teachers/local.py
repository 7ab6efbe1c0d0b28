"""A teacher in this process: another causal language model, with the student's tokenizer or one of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from opd.context import Context
from opd.distributions import Aligned, Categorical, Distribution, Target
from opd.errors import IncompatibleError
from opd.hardware import DEVICE, check_device
from opd.language.attention import check_attention
from opd.language.engines.base import EncodedPrompt, Scorer, followed_by
from opd.language.engines.in_process import InProcess
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.language.own_outputs import check_logits
from opd.language.positions import check_positions
from opd.language.shape import model_shape
from opd.language.tokens import tokens_of
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.teachers.base import LiveTeacher, Teacher, answers_whole_texts_alone
from opd.teachers.memory import Memory, MemorySettings
from opd.teachers.showing import ShowingTeacher
from opd.teachers.translated import TranslatedTeacher, translated
from opd.trajectories import Trajectories
from opd.weights import weights_hash


class ScoringSettings(ModelSettings, ShowingTeacher):
    """What is said of any teacher that is a model of transformers in this process."""

    modality: ClassVar[str | None] = "language"
    device: str | None = Field(None, pattern=DEVICE, description="Where it computes; default the student's device")
    offload: bool = Field(False, description="Keep the weights on the CPU and move them over for each batch")

    cache: MemorySettings | None = Field(
        None, description="Keep answers on disk and never ask twice at the same ids; true takes the defaults"
    )

    @field_validator("cache", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [(Categorical, "the teacher")]

    def check_scorer(self, home: torch.device) -> None:
        away = self.device is not None and torch.device(self.device) != home
        key = "offload" if self.offload else "device" if away else None
        if key is not None:
            raise IncompatibleError(
                f"teacher.{key} keeps it away from the student, and rollout.watch asks it while rollouts are "
                f"written: leave out teacher.{key} or rollout.watch"
            )


class LocalTeacher(ScoringSettings):
    """Scores the student's completions with one forward pass; answers with hidden states and its own head. With
    `tokenizer: own` it reads their text in its own tokens, and answers for spans of it."""

    kind: Literal["local"] = "local"

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        return [model_shape(self, notes)]

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [(Aligned, "the teacher")] if self.has_own_tokenizer else super().answered(student)

    def check_scorer(self, home: torch.device) -> None:
        super().check_scorer(home)
        if self.has_own_tokenizer:
            raise answers_whole_texts_alone(self)

    def build(self, context: Context, student: Student | None) -> LanguageTeacher | TranslatedTeacher:
        made = self.alone(context)
        return translated(made, made.language, student) if self.has_own_tokenizer else made

    def alone(self, context: Context) -> LanguageTeacher:
        """The teacher in its own tokens."""
        check_device(self.device, "teacher.device")
        device = torch.device(self.device) if self.device else context.device
        check_attention(self.attention, "teacher.attention", device)
        language = LanguageModel.load(self, "cpu" if self.offload else device)
        language.requires_grad_(False)
        return LanguageTeacher(language, self, device)


class LanguageTeacher(LiveTeacher[Teacher]):
    """A built language teacher; scores hidden states only, so a whole batch's answers take `2 * D` bytes a position."""

    answers = Categorical

    def __init__(self, language: InProcess, settings: Teacher, device: torch.device):
        self.language, self.settings, self.device = language.eval(), settings, device
        model = getattr(settings, "model", None)
        language.owner = f"the teacher {settings.name or model or ''}".rstrip()
        if isinstance(settings, ShowingTeacher):
            settings.check_shown(language)
        self.offload = getattr(settings, "offload", False)
        self.cache: MemorySettings | None = getattr(settings, "cache", None)
        self.remembers = self.cache is not None
        self._memories: dict[torch.dtype, Memory] = {}
        self._identity: str | None = None

    def identity(self) -> str | None:
        # It is frozen: one look at all of its weights is enough.
        if self._identity is None:
            self._identity = weights_hash(self.language.model)
        return self._identity

    @property
    def notes(self) -> list[str]:
        return self.language.notes

    def check_student(self, student: Student, context: Context) -> None:
        # Refuses ids that the teacher's head has no row for.
        self.language.head(context.temperature, tokens_of(context).vocabulary)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self.language.encode(*self.settings.view(prompt))

    def check_lengths(self, prompts: Sequence[Prompt], budget: int, which: str) -> list[str]:
        longest = max((self.prompt_length(prompt) for prompt in prompts), default=1)
        warning = check_positions(self.language, longest, budget, which)
        return [] if warning is None else [warning]

    def prompt_length(self, prompt: Prompt) -> int:
        return self.language.length(*self.settings.view(prompt))

    def check_outputs(self, trajectories: Trajectories, which: str) -> None:
        if self.offload:
            self.language.to(self.device)
        # The student's view of the prompts will do: it has the same tokenizer.
        check_logits(self.language, trajectories.contexts, trajectories.completions(), which)
        if self.offload:
            self.language.to("cpu")

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: Teacher, context: Context) -> list[Target]:
        home = context.device
        contexts = [self.language.encode(*settings.view(prompt)) for prompt in trajectories.prompts]
        completions = trajectories.completions()
        if self.cache is None:
            rows = self._compute(contexts, completions)
        else:
            rows = self._recall_or_compute(self.cache, contexts, completions, home)
        head = self.language.head(context.temperature, tokens_of(context).vocabulary).detach()
        return [Target(Categorical(torch.cat(rows).to(home), head.to(home)), teacher=settings.name)]

    def check_scorer(self, context: Context) -> None:
        self.settings.check_scorer(context.device)

    def scorer(self, prompts: Sequence[Prompt], begun: Sequence[torch.Tensor], context: Context) -> Scorer:
        views = [self.language.encode(*self.settings.view(prompt)) for prompt in prompts]
        return self.language.scorer([followed_by(v, start) for v, start in zip(views, begun, strict=True)], context)

    def _compute(self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Hidden states of each trajectory, `batch` of them in one forward pass."""
        if self.offload:
            self.language.to(self.device)
        rows: list[torch.Tensor] = []
        size = self.settings.batch
        for start in range(0, len(contexts), size):
            part = completions[start : start + size]
            hidden = self.language(contexts[start : start + size], part)
            rows += torch.split(hidden, [len(actions) for actions in part])
        if self.offload:
            self.language.to("cpu")
        return rows

    def _recall_or_compute(
        self,
        settings: MemorySettings,
        contexts: Sequence[EncodedPrompt],
        completions: Sequence[torch.Tensor],
        home: torch.device,
    ) -> list[torch.Tensor]:
        memory = self._memory(settings)
        paths = [memory.path(context, actions) for context, actions in zip(contexts, completions, strict=True)]
        rows = memory.recall(paths)
        new = [i for i, hidden in enumerate(rows) if hidden is None]
        if new:
            computed = self._compute([contexts[i] for i in new], [completions[i] for i in new])
            for i, hidden in zip(new, computed, strict=True):
                memory.keep(paths[i], hidden)
                rows[i] = hidden
        asked = sum(len(completions[i]) for i in new)
        self.asked = asked / max(1, sum(len(actions) for actions in completions))
        return [hidden.to(home) for hidden in rows if hidden is not None]

    def _memory(self, settings: MemorySettings) -> Memory:
        """That of the dtype in which the teacher computes now: other rounding is another answer."""
        own = next(self.language.parameters())
        kind = own.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own.dtype
        if dtype not in self._memories:
            self._memories[dtype] = Memory(settings, f"{self.identity()} {own.dtype} {dtype}")
        return self._memories[dtype]
