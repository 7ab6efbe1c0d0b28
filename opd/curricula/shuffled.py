"""Every prompt once an epoch, in a new order each time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from opd.context import Context
from opd.curricula.base import Curriculum, Draw, Schedule
from opd.prompts import Prompt


class Shuffled(Curriculum):
    """Uniform without replacement; the order depends on the seed and the epoch alone."""

    kind: Literal["shuffled"] = "shuffled"

    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context, student: Any) -> ShuffledSchedule:
        return ShuffledSchedule(prompts, per_step, context.seed)


class ShuffledSchedule(Schedule):
    """Stateless: a step's prompts follow from its number."""

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int):
        self.prompts, self.per_step, self.seed = prompts, per_step, seed
        self._epoch, self._order = -1, [0]

    def next(self, step: int, signals: Mapping[str, float]) -> Draw:
        first = step * self.per_step
        return Draw([self._at(i) for i in range(first, first + self.per_step)])

    def _at(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self.prompts))
        if epoch != self._epoch:
            # Kept, since shuffling thousands of prompts anew for each one costs more than a small model's step.
            self._epoch, self._order = epoch, list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self.prompts[self._order[place]]
