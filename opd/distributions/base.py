"""The common currency of the loop: what a policy or a teacher believes at each of N states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Self

import torch


class Distribution(ABC):
    """N distributions over the next action, one per packed position.

    Shapes are those of CONTRIBUTING: `N` packed positions, `V` vocabulary, `D` hidden width, `K` top-k entries.
    """

    kind: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def select(self, index: slice | torch.Tensor) -> Self:
        """The distributions at `index` (a slice, int64 positions or a bool mask over N), in that order."""

    @abstractmethod
    def detach(self) -> Self:
        """The same distributions without a graph."""

    def pieces(self) -> Iterator[tuple[torch.Tensor, Distribution]]:
        """`(positions, their distributions)`, int64 positions ascending: one piece, unless several sources answered."""
        yield torch.arange(len(self)), self
