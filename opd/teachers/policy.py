"""A teacher that acts: another policy over the student's action tokens, which may see what the student does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from opd.acting.deciding import PolicyActor, State, states_of
from opd.acting.model import ActionModel, PolicySettings, load_policy, policy_of
from opd.acting.outline import policy_shape
from opd.context import Context
from opd.distributions import Categorical, Distribution, Target
from opd.errors import DataError, IncompatibleError
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.teachers.base import LiveTeacher, Teacher
from opd.teachers.self_teacher import OwnCopy, SelfTeacher
from opd.trajectories import Trajectories
from opd.weights import weights_hash


class PolicyTeacher(PolicySettings, Teacher):
    """A trained policy, asked at the student's states. What it reads its own folder says: one that was made with
    `state` sees the simulator's where the student sees pictures. Chunk, bins and action statistics are the student's.
    `batch` counts states here."""

    kind: Literal["policy"] = "policy"
    modality: ClassVar[str | None] = "action"

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        return [replace(policy_shape(self, notes), trainable=0)]

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [(Categorical, "the teacher")]

    def build(self, context: Context, student: Student) -> LivePolicyTeacher:
        return LivePolicyTeacher(load_policy(self, context.device).requires_grad_(False), self)


class LivePolicyTeacher(LiveTeacher[Teacher]):
    """A built policy that teaches."""

    answers = Categorical

    def __init__(self, model: ActionModel, settings: Teacher):
        self.model, self.settings = model.eval(), settings
        self.vocabulary = model.vocabulary
        self._identity: str | None = None

    @property
    def actor(self) -> PolicyActor:
        return PolicyActor(self.model)

    def identity(self) -> str | None:
        # It is frozen: one look at all of its weights is enough.
        if self._identity is None:
            self._identity = weights_hash(self.model)
        return self._identity

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not self.model.words(self._text(prompt)):
                raise DataError(f"{prompt.where}: the teacher's view of the instruction is empty")

    def _text(self, prompt: Prompt) -> str:
        view = prompt.view(self.settings.sees)
        if not isinstance(view, str):
            raise DataError(f"{prompt.where}: the instruction is a list of messages; a policy reads plain text")
        return view

    def check_student(self, student: Student, context: Context) -> None:
        own = policy_of(student, "the student")
        which = "the teacher" if self.settings.name is None else f"teacher {self.settings.name!r}"
        mine, theirs = own.layout, self.model.layout
        for name in ("chunk", "dimensions", "bins"):
            if getattr(mine, name) != getattr(theirs, name):
                raise IncompatibleError(
                    f"{name} is {getattr(mine, name)} for the student and {getattr(theirs, name)} for {which}: they "
                    "must decide about the same tokens; take a teacher of the student's layout"
                )
        own.statistics.check(self.model.statistics, which)

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: Teacher, context: Context) -> list[Target]:
        states = states_of(trajectories.contexts)
        if settings.sees is not None:
            texts = [
                self._text(prompt)
                for prompt, episode in zip(trajectories.prompts, trajectories.contexts, strict=True)
                for _ in episode.seen
            ]
            states = [State(text, state.seen) for text, state in zip(texts, states, strict=True)]
        said = self.actor.in_batches(states, float(context.temperature), 4 * settings.batch)
        return [Target(said, teacher=settings.name)]


class SelfPolicyTeacher(OwnCopy, LivePolicyTeacher):
    """A copy of the student's policy."""

    def __init__(self, model: ActionModel, settings: SelfTeacher):
        self.take(model, settings)
        LivePolicyTeacher.__init__(self, model, settings)
