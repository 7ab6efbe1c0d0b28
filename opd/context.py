"""What the parts of a run are built with: the few facts that several axes must agree on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Context:
    """Facts of a run, each decided in one place.

    Attributes:
        device: where the student lives.
        temperature: the recipe's one temperature, for sampling, student and teacher alike.
        seed: the recipe's seed.
        vocabulary: number of leading ids common to student and teachers, or None for all.
        excluded: ids before it that are not common to all, ascending; they have probability zero on every side.
        end_ids: ids that end a completion.
        guidance: of flow models: the scale of classifier-free guidance, for student and teachers alike; 1 = without.
        steps: optimiser steps of the run.
    """

    device: torch.device
    temperature: float = 1.0
    seed: int = 0
    vocabulary: int | None = None
    excluded: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    guidance: float = 1.0
    steps: int = 1

    def outside(self, ids: torch.Tensor) -> torch.Tensor:
        """bool, of the shape of `ids`: which of them no distribution of this run holds."""
        beyond = ids >= self.vocabulary if self.vocabulary is not None else torch.zeros_like(ids, dtype=torch.bool)
        return beyond | torch.isin(ids, torch.tensor(self.excluded, dtype=ids.dtype, device=ids.device))

    def with_(self, **changes: Any) -> Context:
        return replace(self, **changes)
