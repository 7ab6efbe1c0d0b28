"""What the parts of a run are built with: the few facts that several axes must agree on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from opd.distributions import EVERY_ID, Vocabulary


@dataclass(frozen=True)
class Context:
    """Facts of a run, each decided in one place.

    Attributes:
        device: where the student lives.
        temperature: the recipe's one temperature, for sampling, student and teacher alike.
        seed: the recipe's seed.
        vocabulary: the ids that student and teachers are over; others have probability zero on every side.
        end_ids: ids that end a completion.
        guidance: of flow models: the scale of classifier-free guidance, for student and teachers alike; 1 = without.
        steps: optimiser steps of the run.
    """

    device: torch.device
    temperature: float = 1.0
    seed: int = 0
    vocabulary: Vocabulary = EVERY_ID
    end_ids: tuple[int, ...] = ()
    guidance: float = 1.0
    steps: int = 1

    def with_(self, **changes: Any) -> Context:
        return replace(self, **changes)
