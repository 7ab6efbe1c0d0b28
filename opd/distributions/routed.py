"""`Routed`: each of N distributions comes from one of several sources, whose heads and widths may differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from opd.distributions.base import Distribution
from opd.distributions.categorical import Categorical, Head
from opd.distributions.vocabulary import Vocabulary


@dataclass(frozen=True)
class Routed(Distribution):
    """What several sources say, each at its own positions alone. Selecting moves indices, not distributions.

    Attributes:
        parts: one distribution a source, all of one kind.
        owners: int64 `[N]`, the part that holds each position's distribution.
        places: int64 `[N]`, where in that part.
    """

    kind: ClassVar[str] = "routed"
    parts: tuple[Distribution, ...]
    owners: torch.Tensor
    places: torch.Tensor

    def __len__(self) -> int:
        return self.owners.shape[0]

    def select(self, index: slice | torch.Tensor) -> Self:
        return replace(self, owners=self.owners[index], places=self.places[index])

    def detach(self) -> Self:
        return replace(self, parts=tuple(part.detach() for part in self.parts))

    def pieces(self) -> Iterator[tuple[torch.Tensor, Distribution]]:
        for owner in self.owners.unique().tolist():
            mine = (self.owners == owner).nonzero().squeeze(1)
            yield mine, self.parts[owner].select(self.places[mine])

    @property
    def vocabulary(self) -> Vocabulary:
        """Of parts that are `Categorical`: one for all."""
        return self.parts[0].vocabulary  # type: ignore[attr-defined]

    def log_probs(self) -> torch.Tensor:
        """float32 `[N, V']` of parts that are `Categorical`: for small N only (reports, tests), as theirs."""
        found = [(mine, piece.log_probs()) for mine, piece in self.pieces()]  # type: ignore[attr-defined]
        whole = found[0][1].new_empty(len(self), found[0][1].shape[1])
        for mine, values in found:
            whole[mine] = values
        return whole


def joined(parts: Sequence[Distribution], positions: Sequence[torch.Tensor]) -> Distribution:
    """One answer of several for N positions: the rows of part k, in order, belong at `positions[k]`.

    Answers that are tensors of one shape a position (`Sampled`, `TopK` of one K, ...), or hidden states under one head,
    become one such answer; others, as hidden states of different widths and heads, stay apart in a `Routed`.

    Args:
        parts: of one kind.
        positions: int64, ascending; all together each of N positions once.
    """
    if len(parts) == 1:
        return parts[0]
    order = torch.cat(list(positions)).argsort()
    fields = [vars(part) for part in parts]
    rows = {_rows_of(part) for part in parts}
    if len(rows) == 1 and None not in rows:
        return type(parts[0])(**{name: torch.cat([each[name] for each in fields])[order] for name in fields[0]})
    alike = [part for part in parts if isinstance(part, Categorical) and _one_head(part.head, parts[0])]
    if len(alike) == len(parts):
        return replace(alike[0], hidden=torch.cat([part.hidden for part in alike])[order.to(alike[0].hidden.device)])
    flat: list[Distribution] = []
    owners, places = [], []
    for part, mine in zip(parts, positions, strict=True):
        # One that is in parts already gives its parts, so that none lies within another.
        own = part.owners if isinstance(part, Routed) else torch.zeros(len(mine), dtype=torch.int64)
        owners.append((own + len(flat)).to(mine.device))
        places.append((part.places if isinstance(part, Routed) else torch.arange(len(mine))).to(mine.device))
        flat += part.parts if isinstance(part, Routed) else (part,)
    return Routed(tuple(flat), torch.cat(owners)[order], torch.cat(places)[order])


def _one_head(head: Head, first: Distribution) -> bool:
    """Whether `head` is that of `first`: made of the same weights, under the same settings."""
    return isinstance(first, Categorical) and all(
        _one(value, other) for value, other in zip(vars(head).values(), vars(first.head).values(), strict=True)
    )


def _one(value: object, other: object) -> bool:
    if not (isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor)):
        return value is other or value == other
    if value.device != other.device or value.shape != other.shape:
        return False
    # Weights are not read through: those of two models are not the same, and where they are, nothing is lost.
    return value.data_ptr() == other.data_ptr() or (not value.is_floating_point() and torch.equal(value, other))


def _rows_of(part: Distribution) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...] | None:
    """dtype and shape of a position's row of each field; None when a field has no rows."""
    fields = list(vars(part).values())
    if not all(isinstance(f, torch.Tensor) and f.ndim and len(f) == len(part) for f in fields):
        return None
    return tuple((f.dtype, tuple(f.shape[1:])) for f in fields)
