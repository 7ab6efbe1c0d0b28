"""A teacher in this process that predicts a velocity, as the student does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from opd.context import Context
from opd.distributions import Gaussian, Target
from opd.errors import IncompatibleError
from opd.flow.denoising import believe
from opd.flow.encoder import check_prompts, same_vocabulary
from opd.flow.model import FlowModel, FlowSettings, flow_model_of, load_flow_model
from opd.flow.outline import teacher_shape
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.teachers.base import LiveTeacher, Teacher
from opd.teachers.self_teacher import OwnCopy, SelfTeacher
from opd.trajectories import Trajectories
from opd.weights import weights_hash


class FlowTeacher(FlowSettings, Teacher):
    """Answers with the Gaussian that its own velocity gives at the student's states, with the student's times, noise
    level and guidance. Text encoders and VAE are the student's and are not loaded again; a prompt table is its own."""

    kind: Literal["flow"] = "flow"
    modality: ClassVar[str | None] = "flow"

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        return [teacher_shape(self, student, notes)]

    def build(self, context: Context, student: Student) -> LiveFlowTeacher:
        reader = flow_model_of(student, "the student")
        model = load_flow_model(self, context.device, reader.resolution, like=reader)
        return LiveFlowTeacher(model.requires_grad_(False), self, reader)


GRID = 4
"""Steps by which schedulers are compared."""


def _written(times: torch.Tensor) -> str:
    return ", ".join(f"{t:.3g}" for t in times.tolist())


class LiveFlowTeacher(LiveTeacher[Teacher]):
    """A built flow teacher.

    Args:
        reader: the student's model, which reads prompts of another view; default its own.
    """

    answers = Gaussian

    def __init__(self, model: FlowModel, settings: Teacher, reader: FlowModel | None = None):
        self.model, self.settings, self.reader = model.eval(), settings, reader or model
        self._identity: str | None = None

    def identity(self) -> str | None:
        # It is frozen: one look at all of its weights is enough.
        if self._identity is None:
            self._identity = weights_hash(self.model)
        return self._identity

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        # max_prompt_tokens is of the student's prompts: a view has as many as its reader takes.
        if self.settings.sees is not None:
            check_prompts(prompts, self.reader.encoder, None, self.settings.sees)

    def check_student(self, student: Student, context: Context) -> None:
        other = flow_model_of(student, "the student")
        self.check_writer(other)
        own, theirs = (model.grid(GRID).cpu() for model in (other, self.model))
        if not torch.allclose(own, theirs, atol=1e-4):
            raise IncompatibleError(
                f"the student's scheduler goes through the times {_written(own)} and a teacher's through "
                f"{_written(theirs)}; use models with the same scheduler, its shift included"
            )

    def check_writer(self, other: FlowModel) -> None:
        """Raise `IncompatibleError` when it draws other sizes, or reads prompts otherwise, than the student's model
        `other`; images alone it may draw through times of its own."""
        if self.model.shape != other.shape:
            raise IncompatibleError(
                f"the student's latents are {list(other.shape)} and a teacher's {list(self.model.shape)}; "
                "use a teacher of the student's architecture"
            )
        if not same_vocabulary(self.model.encoder, other.encoder):
            raise IncompatibleError(
                "student and teacher read prompts differently; use a teacher with the student's kind of encoder and "
                "its vocabulary"
            )

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: Teacher, context: Context) -> list[Target]:
        if settings.sees is None:
            conditions = [start.condition for start in trajectories.contexts]
        else:
            views = [str(prompt.view(settings.sees)) for prompt in trajectories.prompts]
            conditions = self.reader.encoder.encode(views)
        parts, done = [], 0
        for part, _ in trajectories.split(settings.batch):
            parts.append(believe(self.model, part, conditions[done : done + len(part)]))
            done += len(part)
        whole = Gaussian(*(torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])))
        return [Target(whole, teacher=settings.name)]


class SelfFlowTeacher(OwnCopy, LiveFlowTeacher):
    """A copy of the student's model."""

    def __init__(self, model: FlowModel, settings: SelfTeacher, reader: FlowModel):
        self.take(model, settings)
        LiveFlowTeacher.__init__(self, model, settings, reader)
