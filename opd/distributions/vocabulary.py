"""`Vocabulary`: the set of ids that a run's distributions are over, and the columns that they have in logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from opd.errors import IncompatibleError


@dataclass(frozen=True)
class Vocabulary:
    """Either the leading `size` ids without those `excluded`, or a slice: `ids` alone.

    Logits have one column for each leading id, where an excluded id's has no probability, or one for each id of a
    slice. Student and teachers of a run are over one set.

    Attributes:
        size: number of leading ids; None for as many as a head has rows.
        excluded: ids before it that do not count, ascending.
        ids: the S ids of a slice, ascending: action tokens, a draft model's vocabulary. `size` is None then, and
            nothing is excluded.
    """

    size: int | None = None
    excluded: tuple[int, ...] = ()
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.ids is not None and (self.size is not None or self.excluded):
            raise IncompatibleError("a vocabulary is leading ids (size, excluded) or a slice (ids), not both")
        if self.ids is not None and (not self.ids or list(self.ids) != sorted({*self.ids}) or self.ids[0] < 0):
            raise IncompatibleError("the ids of a vocabulary are one or more, not negative, ascending, each once")

    @staticmethod
    def of(ids: Iterable[int]) -> Vocabulary:
        """The slice of these ids, in any order."""
        return Vocabulary(ids=tuple(sorted(set(ids))))

    def __str__(self) -> str:
        if self.ids is not None:
            return f"{len(self.ids)} ids from {self.ids[0]} to {self.ids[-1]}"
        leading = f"{'all' if self.size is None else self.size} ids"
        return f"{leading} without {len(self.excluded)} of them" if self.excluded else leading

    def width(self, rows: int) -> int:
        """Columns of the logits of a head with `rows` rows."""
        return len(self.ids) if self.ids is not None else self.size or rows

    def holds(self, i: int) -> bool:
        if self.ids is not None:
            return i in self.ids
        return (self.size is None or i < self.size) and i not in self.excluded

    def outside(self, ids: torch.Tensor) -> torch.Tensor:
        """bool, of the shape of `ids`: which of them have no probability."""
        if self.ids is not None:
            return ~torch.isin(ids, self._members(ids.device))
        beyond = ids >= self.size if self.size is not None else torch.zeros_like(ids, dtype=torch.bool)
        return beyond | torch.isin(ids, self._members(ids.device))

    def columns(self, ids: torch.Tensor) -> torch.Tensor:
        """int64: the column of each id.

        Raises:
            IncompatibleError: an id is not of the slice.
        """
        if self.ids is None:
            return ids
        members = self._members(ids.device)
        found = torch.searchsorted(members, ids.contiguous()).clamp(max=len(self.ids) - 1)
        missing = members[found] != ids
        if bool(missing.any()):
            raise IncompatibleError(
                f"id {int(ids[missing][0])} is none of this run's vocabulary ({self}): mask that position, or take the "
                "id into the vocabulary"
            )
        return found

    def named(self, columns: torch.Tensor) -> torch.Tensor:
        """int64: the id of each column."""
        return columns if self.ids is None else self._members(columns.device)[columns]

    def excluded_on(self, device: torch.device) -> torch.Tensor | None:
        """int64 `[E]`, the columns without probability; None where there are none."""
        return self._members(device) if self.excluded else None

    def _members(self, device: torch.device) -> torch.Tensor:
        """The slice's ids, or the excluded ones: moved once to each device."""
        if device not in self._moved:
            self._moved[device] = torch.tensor(self.ids or self.excluded, dtype=torch.int64, device=device)
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, torch.Tensor]:
        return {}


EVERY_ID = Vocabulary()
"""All ids of whatever head."""
