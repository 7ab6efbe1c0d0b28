"""A teacher that was asked before: its answers at the trajectories of a store, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.distributions import Categorical, Distribution, Head, Target
from opd.errors import IncompatibleError
from opd.language.engines.in_process import InProcess
from opd.language.student import LanguageStudent
from opd.language.tokens import tokens_of
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.prompts.pictures import is_picture
from opd.store.pictures import check_pictures
from opd.store.store import Store
from opd.store.targets import ANSWERS, Targets, TargetsHeader
from opd.teachers.base import LiveTeacher, Teacher, answers_whole_texts_alone
from opd.trajectories import Trajectories
from opd.vision.engine import ImageTextModel
from opd.vision.identity import pixels_hash
from opd.vision.view import view_of


class StoredTeacher(Teacher):
    """What `opd score` wrote. For objective `lightning` it must be the teacher that the student was fine-tuned by, as
    its paper has it: the saved student says so in its `opd.json`, or `sft_teacher` does. Pictures that it saw
    are compared with those of the rows that have them."""

    kind: Literal["stored"] = "stored"
    modality: ClassVar[str | None] = "language"
    path: str = Field(description="The store's folder")
    targets: str | None = Field(None, description="Name of the targets; default the store's only ones")
    consistency: Literal["required", "ignored"] = Field(
        "required",
        description="Of objective lightning: ignored trains with a teacher other than the fine-tuning's, for ablations",
    )
    sft_teacher: str | None = Field(
        None, description="Hash of the teacher that wrote the fine-tuning data; default what the student's folder says"
    )

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        here = self._is_here()
        notes.append(
            f"{self.path}: its answers are read from the disk, "
            + (f"kind {self._targets().header.kind}" if here else "and it is not on this machine")
        )
        return []

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [(ANSWERS[self._targets().header.kind], "the store")] if self._is_here() else []

    @property
    def listed(self) -> int | None:
        return self._targets().header.top_k if self._is_here() else None

    def check_scorer(self, home: torch.device) -> None:
        raise answers_whole_texts_alone(self)

    def _is_here(self) -> bool:
        return (Path(self.path) / "store.json").is_file()

    def _targets(self) -> Targets:
        return Targets.open(Store.open(self.path), self.targets)

    def build(self, context: Context, student: Student) -> StoredAnswers:
        return StoredAnswers(self, student.reader if isinstance(student, LanguageStudent) else None)


class StoredAnswers(LiveTeacher[StoredTeacher]):
    """The built teacher.

    Args:
        student: what the student reads with; pictures that the teacher saw are looked at by it.
    """

    everywhere = False
    asked = 0.0

    def __init__(self, settings: StoredTeacher, student: InProcess | None = None):
        self.settings = settings
        self.store = Store.open(settings.path)
        self.targets = Targets.open(self.store, settings.targets)
        self.reads_pictures = self.targets.header.processor is not None
        """Of the teacher that scored."""
        self.viewer = _viewer(self.targets.header, student)
        self._unseen = 0
        self.answers = ANSWERS[self.targets.header.kind]
        self.vocabulary = self.targets.header.covered()
        self._head: Head | None = None
        self.failed: Counter[str] = Counter()

    @property
    def notes(self) -> list[str]:
        if not self._unseen:
            return []
        return [
            f"{self._unseen} prompts lack the pictures that the teacher of {self.targets.path} saw, or the student "
            "reads none: they are not compared with those"
        ]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        if not self.reads_pictures:
            return
        for prompt in prompts:
            if prompt.id not in self.store.index:
                continue
            found = None if self.viewer is None else _seen(self.viewer, prompt, self.targets.header)
            if found is None:
                self._unseen += 1
                continue
            for row in self.store.rows_of(prompt.id)[:: self.store.header.group]:
                check_pictures(
                    prompt, found, self.targets.pictures(row), f"{self.targets.path}, row {row}", "teacher's "
                )

    def identity(self) -> str | None:
        return self.targets.header.teacher["weights"]

    def check_student(self, student: Student, context: Context) -> None:
        header, path = self.targets.header, self.targets.path
        missing = self.targets.missing()
        if missing:
            raise IncompatibleError(
                f"{path} is not complete, {len(missing)} of {self.store.header.shards} shards of targets are missing; "
                "run opd score again, it goes on where it stopped"
            )
        if header.kind != "exact" and context.temperature != header.temperature:
            raise IncompatibleError(
                f"{path} was scored at temperature {header.temperature:g} and the recipe has {context.temperature:g}; "
                "only targets of kind exact can be read at another one"
            )
        compared = tokens_of(context).vocabulary
        if header.kind != "exact" and self.vocabulary != compared:
            raise IncompatibleError(
                f"{path} is normalised over another vocabulary than this run compares ({self.vocabulary}, {compared})"
                "; run opd score again with --name, or score targets of kind exact, which can be read so"
            )
        if header.kind == "exact":
            self.targets.head().over(compared, str(path))

    def check_origin(self, student: Student) -> None:
        if self.settings.consistency == "ignored":
            return
        mine = self.identity()
        origin = getattr(student, "origin", {})
        known = [self.settings.sft_teacher] if self.settings.sft_teacher else origin.get("teachers", [])
        if mine in known:
            return
        if not known:
            raise IncompatibleError(
                f"objective 'lightning' wants the teacher that fine-tuned the student, and the student does not say "
                f"which teacher that was: set teacher.sft_teacher={mine} if it is the one that scored "
                f"{self.targets.path}, or teacher.consistency=ignored for an ablation; objective=reverse_kl on targets "
                "of kind exact or top_k takes any student"
            )
        raise IncompatibleError(
            f"{self.targets.path} was scored by {mine} and the student was fine-tuned by {', '.join(known)}: score it "
            "with that teacher, or set teacher.consistency: ignored for an ablation; objective=reverse_kl on targets "
            "of kind exact or top_k takes any teacher"
        )

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: StoredTeacher, context: Context) -> list[Target]:
        self._check_rows(trajectories)
        assert trajectories.stored is not None
        found = self.targets.answer(trajectories.stored.tolist(), trajectories.lengths.tolist())
        home = context.device
        left = torch.tensor(self.targets.left_out(trajectories.stored.tolist()), dtype=torch.bool)
        missing = left.repeat_interleave(trajectories.lengths).to(home) if bool(left.any()) else None
        self.failed["a text that the teacher's tokenizer does not give back"] += int(left.sum())
        if isinstance(found, Categorical):
            answer: Distribution = Categorical(found.hidden.to(home), self._head_for(context))
        else:
            answer = type(found)(**{name: value.to(home) for name, value in vars(found).items()})
        return [Target(answer, teacher=settings.name, missing=missing)]

    @property
    def leaves_out(self) -> bool:
        return self.targets.header.kind == "spans"

    def failures(self) -> dict[str, int]:
        return {reason: count for reason, count in self.failed.items() if count}

    def _head_for(self, context: Context) -> Head:
        if self._head is None or self._head.weight.device != context.device:
            self._head = (
                self.targets.head().over(tokens_of(context).vocabulary, str(self.targets.path)).to(context.device)
            )
        return replace(self._head, temperature=context.temperature)

    def _check_rows(self, trajectories: Trajectories) -> None:
        """The trajectories must be beginnings of the store's rows, id by id."""
        advice = f"teacher 'stored' answers only at trajectories of {self.settings.path}: take rollout: stored with "
        if trajectories.stored is None or bool((trajectories.stored < 0).any()):
            raise IncompatibleError(f"{advice}that path")
        for row, actions in zip(trajectories.stored.tolist(), trajectories.completions(), strict=True):
            if row >= self.store.header.rows or not torch.equal(self.store.actions(row)[: len(actions)], actions.cpu()):
                raise IncompatibleError(f"{advice}that path; row {row} has other tokens there")


def _viewer(header: TargetsHeader, student: InProcess | None) -> ImageTextModel | None:
    """Who opens the pictures that a teacher saw as it did; None where the student reads none."""
    if header.processor is None or not isinstance(student, ImageTextModel):
        return None
    pictures = replace(student.pictures, column=header.images)
    return ImageTextModel(None, student.processor, student.template_options, pictures)


def _seen(viewer: ImageTextModel, prompt: Prompt, header: TargetsHeader) -> list[str] | None:
    """Hashes of the pictures in the teacher's view of a prompt; None where the row does not have them."""
    wanted = [header.sees]
    if not is_picture(prompt.fields.get(header.sees or prompt.column)):
        wanted.append(header.images)
    if any(column is not None and column not in prompt.fields for column in wanted):
        return None
    return [pixels_hash(picture) for picture in view_of(viewer, prompt, header.sees).pictures]
