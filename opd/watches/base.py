"""Watches: between segments of a rollout they see the rows that are being written, may end some, and keep what they
found out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch

from opd.choice import Choice
from opd.context import Context
from opd.distributions import Target, TopK
from opd.language.engines.base import EncodedPrompt
from opd.planning import Shape
from opd.prompts import Prompt

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import Answering, LiveTeacher


S = TypeVar("S", bound="Watch")


@dataclass(frozen=True)
class Rows(Generic[S]):
    """W rows that began together, as far as they are written: those that are going have drawn equally many tokens.

    Attributes:
        settings: the watch's at the step, numbers in the places of schedules.
        context: the run's at the step, with its temperature.
        prompts: W prompts; a group's rows are neighbours.
        contexts: W prompts as the writer reads them, with what was begun behind them.
        begun: W int64 `[B_i]`, what another source had written before this one went on; empty where none had.
        actions: W int64 `[T_i]` that were drawn here so far, the end token included.
        log_probs: W float32 `[T_i]`, under the distribution that they were drawn from.
        going: places (0 to W - 1) of the rows that are still being written.
        candidates: W times the writer's likeliest ids at each of the T_i states, before any cut, as many as
            `LiveWatch.candidates` asks for; empty where that is 0.
    """

    settings: S
    context: Context
    prompts: Sequence[Prompt]
    contexts: Sequence[EncodedPrompt]
    begun: Sequence[torch.Tensor]
    actions: Sequence[torch.Tensor]
    log_probs: Sequence[torch.Tensor]
    going: Sequence[int]
    candidates: Sequence[TopK] = ()

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Findings:
    """What a watch knows at the end of W rows of N positions in all, packed in their order.

    Attributes:
        columns: tensors `[N, ...]` by name, for `Trajectories.columns`.
        answers: what teachers said at every position, one target a teacher by its name, for `Trajectories.answers`;
            these teachers are not asked again. None where none was asked.
    """

    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    answers: tuple[Target, ...] | None = None


class LiveWatch(ABC, Generic[S]):
    """A built watch, of the settings `S`. Rows that begin together are watched together, by a copy (`copy.copy`) of
    the built watch that is theirs alone: what `begin` sets on `self`, `look` and `end` find again. Other rows may begin
    while these are being written. To score new tokens without going over the whole again, see
    `opd.language.engines.base.Engine.scorer`, or of a teacher `opd.teachers.LiveTeacher.scorer`.

    Attributes:
        candidates: how many of the writer's likeliest ids at each state it wants to see.
    """

    candidates: int = 0

    def begin(self, rows: Rows[S]) -> None:
        """Nothing of these rows is drawn yet."""

    @abstractmethod
    def look(self, rows: Rows[S]) -> Mapping[int, str]:
        """Called after each segment, as long as a row is being written.

        Returns:
            By place, for the rows that shall end here: why, in a few words.
        """

    def end(self, rows: Rows[S]) -> Findings:
        """Every row is as long as it gets: what there is to keep."""
        return Findings()


class Watch(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "watch"
    modality: ClassVar[str | None] = "language"
    shown: ClassVar[tuple[str, ...]] = ("stopped",)

    def scorers(self, teachers: Sequence[tuple[str | None, Sequence[Shape]]]) -> Sequence[Shape]:
        """Which models score the rows while they are written, for a plan: one of them each row. `teachers` with their
        names."""
        return ()

    def check_teachers(self, teachers: Sequence[Answering], home: torch.device) -> None:
        """Raise `IncompatibleError` when these teachers cannot answer what it asks; `home` is the student's device."""

    @abstractmethod
    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> LiveWatch:
        """Make the watch of a rollout, of a built student and built teachers."""
