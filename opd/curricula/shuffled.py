"""Every prompt once an epoch, in a new order each time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from opd.curricula.base import Curriculum, Draw, Schedule
from opd.prompts import Prompt


class Shuffled(Curriculum):
    """Uniform without replacement; the order depends on the seed and the epoch alone."""

    kind: Literal["shuffled"] = "shuffled"

    def build(self, prompts: Sequence[Prompt], per_step: int, budget: int, seed: int) -> ShuffledSchedule:
        return ShuffledSchedule(prompts, per_step, budget, seed)


class ShuffledSchedule(Schedule):
    """Stateless: a step's prompts follow from its number."""

    def __init__(self, prompts: Sequence[Prompt], per_step: int, budget: int, seed: int):
        self.prompts, self.per_step, self.budget, self.seed = prompts, per_step, budget, seed

    def next(self, step: int, signals: Mapping[str, float]) -> Draw:
        first = step * self.per_step
        return Draw([self._at(i) for i in range(first, first + self.per_step)], self.budget)

    def _at(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self.prompts))
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return self.prompts[order[place]]
