"""The environment's own expert as the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from opd.acting.deciding import ScriptedActor, states_of
from opd.acting.model import ActionModel, policy_of
from opd.context import Context
from opd.distributions import Categorical, Distribution, Target
from opd.environments.control import Control
from opd.errors import DataError
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.teachers.base import LiveTeacher, Teacher
from opd.trajectories import Trajectories


class ScriptedTeacher(Teacher):
    """What the environment's own expert would do at the student's states, open loop for a chunk: a Gaussian round its
    actions, cut into the student's bins. It sees the simulator's state, costs no model, and is asked while the
    simulator stands there, so it teaches in rollouts of a simulator alone."""

    kind: Literal["scripted"] = "scripted"
    modality: ClassVar[str | None] = "action"

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [(Categorical, "the teacher")]

    def build(self, context: Context, student: Student) -> LiveScriptedTeacher:
        return LiveScriptedTeacher(policy_of(student, "the student"), self)


class LiveScriptedTeacher(LiveTeacher[Teacher]):
    """The built teacher; its tokens are those of the student's `model`."""

    answers = Categorical

    def __init__(self, model: ActionModel, settings: Teacher):
        self.settings, self.vocabulary = settings, model.vocabulary
        self.actor = ScriptedActor(model)

    def fingerprint(self) -> str:
        return "scripted"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            environment = Control.of(prompt)
            if not environment.expert:
                raise DataError(
                    f"{prompt.where}: environment {environment.model_dump()['kind']!r} has no expert of its own, and "
                    "teacher 'scripted' asks for it; take a teacher of kind policy"
                )

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: Teacher, context: Context) -> list[Target]:
        return [Target(self.actor.believe(states_of(trajectories.contexts), 1.0), teacher=settings.name)]
