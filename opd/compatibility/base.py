"""Signals of compatibility: at each state, how much student and teacher still look at the same continuations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from pydantic import Field

from opd.choice import Choice, kind_of
from opd.distributions import Categorical, Distribution, TopK
from opd.errors import IncompatibleError

if TYPE_CHECKING:
    from opd.teachers import Answering

A = TypeVar("A", bound="Answering")

CHUNK_NUMBERS = 4 * 2**20
"""Log-probabilities that are looked at together, on either side."""


class Compatibility(Choice):
    """Base of the axis. A choice gives every state a number from 0 to 1, which is logged under `measured`; below
    `threshold` the state is a drift event."""

    axis: ClassVar[str] = "compatibility"
    modality: ClassVar[str | None] = "language"
    measured: ClassVar[str]
    """What the log calls the number."""
    accepts: ClassVar[tuple[str, ...]] = ("categorical", "top_k")
    """Kinds of teacher distribution that it can be found from."""

    k: int = Field(16, ge=1, description="Likeliest ids of each side that are looked at")

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The number below which a state is a drift event."""

    @abstractmethod
    def of_rows(
        self,
        student: tuple[torch.Tensor, torch.Tensor],
        teacher: tuple[torch.Tensor, torch.Tensor],
        actions: torch.Tensor,
    ) -> torch.Tensor:
        """float32 `[C]` numbers of C states.

        Args:
            student, teacher: log-probabilities `[C, K]`, normalised over the whole vocabulary and descending, with
                their ids, int64 `[C, K]`.
            actions: int64 `[C]`, the ids that were taken.
        """

    @torch.no_grad()
    def measure(self, student: Distribution, teacher: Distribution, actions: torch.Tensor) -> torch.Tensor:
        """float32 `[N]`, detached: the numbers of N states, a few rows at a time.

        Args:
            student, teacher: `[N]` distributions, whole or of their likeliest ids.
            actions: int64 `[N]`.

        Raises:
            IncompatibleError: one side holds fewer than `k` ids of each state.
        """
        found = torch.zeros(len(actions), device=actions.device)
        assert isinstance(student, Categorical | TopK)
        for mine, piece in teacher.pieces():
            assert isinstance(piece, Categorical | TopK)
            rows = max(128, CHUNK_NUMBERS // max(_width(student), _width(piece)))
            for start in range(0, len(mine), rows):
                here = mine[start : start + rows].to(actions.device)
                own, theirs = student.select(here), piece.select(slice(start, start + rows))
                found[here] = self.of_rows(
                    self._top(own, "the student"), self._top(theirs, "the teacher"), actions[here]
                )
        return found

    def check_teacher(self, teacher: Answering, whose: str) -> None:
        """Raise `IncompatibleError` when what a teacher answers does not tell; `whose` signal this is."""
        if teacher.answers.kind not in self.accepts:
            raise IncompatibleError(
                f"{whose} with signal {kind_of(self)!r} needs a teacher that answers {' or '.join(self.accepts)}, and "
                f"this one answers {teacher.answers.kind!r}: take a live teacher, or a store of kind exact"
            )
        listed = teacher.settings.listed
        if listed is not None and self.k > listed:
            raise self._lists_less("the teacher", listed)

    def check_ids(self, count: int) -> None:
        """Raise `IncompatibleError` at start-up when it looks at more ids of a state than the `count` that student and
        teachers have in common."""
        if self.k > count:
            # Of all ids any two models share all.
            raise IncompatibleError(
                f"signal {kind_of(self)!r} looks at k={self.k} ids, and student and teacher have {count} in common: "
                "set signal.k to a small part of them"
            )

    def events(self, signal: torch.Tensor) -> torch.Tensor:
        """bool `[N]`, which of the states with these numbers are drift events."""
        return signal < self.threshold

    def _lists_less(self, whose: str, count: int) -> IncompatibleError:
        return IncompatibleError(
            f"signal {kind_of(self)!r} looks at k={self.k} ids, and {whose} answers with {count}: set signal.k to that "
            "or less, or have more answered"
        )

    def _top(self, side: Categorical | TopK, whose: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The `k` likeliest ids of each state and their log-probabilities, descending."""
        if isinstance(side, Categorical):
            if side.head.size < self.k:
                # Of all ids any two models share all.
                raise IncompatibleError(
                    f"signal {kind_of(self)!r} looks at k={self.k} ids, and the vocabulary of {whose} has "
                    f"{side.head.size}: set signal.k to a small part of it"
                )
            top = side.log_probs().topk(self.k, dim=-1)
            return top.values, side.vocabulary.named(top.indices)
        if side.log_probs.shape[1] < self.k:
            raise self._lists_less(whose, side.log_probs.shape[1])
        top = side.log_probs.topk(self.k, dim=-1)
        return top.values.float(), side.ids.gather(1, top.indices)


def _width(side: Categorical | TopK) -> int:
    return side.head.size if isinstance(side, Categorical) else side.log_probs.shape[1]


def the_one(teachers: Sequence[A], name: str | None, whose: str) -> A:
    """The teacher that a signal compares with the student; `whose` signal this is.

    Raises:
        IncompatibleError: there is none, none of that name, or without a name there are several.
    """
    mine = [teacher for teacher in teachers if name in (None, teacher.settings.name)]
    if len(mine) != 1:
        known = [teacher.settings.name for teacher in teachers]
        raise IncompatibleError(
            f"{whose} compares the student with one teacher, and {name!r} names {len(mine) or 'none'} of {known}: give "
            "the recipe's teachers names, and set 'teacher' to one of them"
        )
    return mine[0]


def shared(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """bool `[C, K]`, which of the ids `[C, K]` are among the others `[C, L]` of their row."""
    return (ids[:, :, None] == others[:, None, :]).any(-1)
