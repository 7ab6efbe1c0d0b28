"""A completion that goes round in circles: it ends instead of filling its budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.watches.base import LiveWatch, Rows, Watch

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class Repetition(Watch):
    """Ends a completion whose last tokens are one piece of at most `longest` tokens, `times` times over. It counts as
    cut off: no end token is added, and what was written stays as it was drawn."""

    kind: Literal["repetition"] = "repetition"
    times: int = Field(8, ge=2, description="How often a piece stands in a row when its completion is ended")
    longest: int = Field(16, ge=1, description="Most tokens of the piece that repeats")

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> RepetitionWatch:
        return RepetitionWatch()


class RepetitionWatch(LiveWatch[Repetition]):
    """The built watch."""

    def look(self, rows: Rows[Repetition]) -> Mapping[int, str]:
        times, longest = rows.settings.times, rows.settings.longest
        sizes = {place: repeated(rows.actions[place], times, longest) for place in rows.going}
        return {place: f"{size} tokens {times} times over" for place, size in sizes.items() if size is not None}


def repeated(actions: torch.Tensor, times: int, longest: int) -> int | None:
    """The size of the smallest piece of at most `longest` tokens that stands `times` times at the end of int64 `[T]`
    actions; None where there is none."""
    end = actions[-times * longest :]
    for size in range(1, min(longest, len(end) // times) + 1):
        last = end[-times * size :]
        if torch.equal(last[size:], last[:-size]):
            return size
    return None
