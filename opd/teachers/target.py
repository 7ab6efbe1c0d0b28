"""The target of the drafter that is trained: it teaches what it found while it verified."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from opd.context import Context
from opd.distributions import Categorical, Distribution, Target
from opd.drafting.record import Drafted
from opd.drafting.target import Target as DraftTarget
from opd.drafting.tokens import draft_tokens
from opd.errors import IncompatibleError, SelfTestError
from opd.language.own_outputs import TOLERANCE, compute_dtype
from opd.planning import Shape
from opd.policies.base import Student
from opd.teachers.base import LiveTeacher, Teacher
from opd.trajectories import Trajectories
from opd.weights import weights_hash


class TargetTeacher(Teacher):
    """The model that `student.target` names; nothing is loaded a second time. Its answers come with the rollout, made
    as it verified; of other trajectories it reads every block anew."""

    kind: Literal["target"] = "target"
    modality: ClassVar[str | None] = "language"

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        return []

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [(Categorical, "the target")]

    def build(self, context: Context, student: Student) -> LiveTargetTeacher:
        target = getattr(student, "target", None)
        if not isinstance(target, DraftTarget):
            raise IncompatibleError(
                "teacher 'target' is the target of a drafter, and the student is none: take student.kind draft, or a "
                "teacher of kind local"
            )
        if self.sees is not None:
            raise IncompatibleError("teacher.sees: a target verifies under the prompt that it writes to; leave it out")
        return LiveTargetTeacher(self, target)


class LiveTargetTeacher(LiveTeacher[TargetTeacher]):
    """The built teacher."""

    answers = Categorical

    def __init__(self, settings: TargetTeacher, target: DraftTarget):
        self.settings, self.target = settings, target
        self._identity: str | None = None

    def identity(self) -> str | None:
        if self._identity is None:
            self._identity = weights_hash(self.target.language.model)
        return self._identity

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: TargetTeacher, context: Context) -> list[Target]:
        hidden = self._read(trajectories)
        head = self.target.language.head(context.temperature, draft_tokens(context).vocabulary).detach()
        return [Target(Categorical(hidden.to(context.device), head), teacher=settings.name)]

    def check_outputs(self, trajectories: Trajectories, which: str) -> None:
        came = next((t for t in trajectories.answers or () if t.teacher == self.settings.name), None)
        learnt = trajectories.learnt
        if came is None or not bool(learnt.any()):
            return
        assert isinstance(came.distribution, Categorical)
        head = came.distribution.head
        ours, own = (head.logits(hidden[learnt]) for hidden in (came.distribution.hidden, self._read(trajectories)))
        off = float((ours - own).abs().amax(1).mean() / own.abs().max().clamp(min=1e-6))
        if not off <= max(TOLERANCE[compute_dtype(self.target.language)], 1e-3):
            raise SelfTestError(
                f"{which}: what the target found while it verified is not what it finds of the same text read anew, by "
                f"{off:.1%}: {self.target.language.family} cannot be the target of a drafter here"
            )

    @torch.no_grad()
    def _read(self, trajectories: Trajectories) -> torch.Tensor:
        """Final hidden states `[N, D]` at the slots, each block behind its own beginning: N plain passes' worth."""
        before, blocks = [], []
        for record, proposed in zip(trajectories.contexts, trajectories.completions(), strict=True):
            assert isinstance(record, Drafted)
            text = torch.cat([record.prompt, record.response])
            before += [text[: anchor + 1] for anchor in record.anchors.tolist()]
            blocks += list(proposed.cpu().view(len(record.anchors), -1)) if len(proposed) else []
        size, parts = (
            self.settings.batch,
            [torch.zeros(0, self.target.outline.width, device=self.target.language.device)],
        )
        with self.target.language.quiet():
            for start in range(0, len(blocks), size):
                parts.append(self.target.language(before[start : start + size], blocks[start : start + size]))
        return torch.cat(parts)
