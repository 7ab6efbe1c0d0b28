"""Every prompt once an epoch, in a new order each time; of sources with weights each in an epoch of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from opd.context import Context
from opd.curricula.base import Asker, Course, Curriculum, Draw
from opd.prompts import Prompt


class Shuffled(Curriculum):
    """Uniform without replacement; the order depends on the seed and the epoch alone. Where the sources of prompts have
    a `weight`, draws are shared out by it as evenly as can be, and each source goes through its own prompts."""

    kind: Literal["shuffled"] = "shuffled"

    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context) -> ShuffledCourse:
        return ShuffledCourse(prompts, per_step, context.seed)


class ShuffledCourse(Course):
    """Stateless: a step's prompts follow from its number."""

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int):
        self.prompts, self.per_step = prompts, per_step
        weights = {prompt.source: prompt.weight for prompt in prompts if prompt.weight is not None}
        self.shares = {source: weight / sum(weights.values()) for source, weight in weights.items()}
        if self.shares:
            self.epochs = {k: Epochs([p for p in prompts if p.source == k], f"{seed}/{k}") for k in weights}
        else:
            self.epochs = {0: Epochs(prompts, f"{seed}")}
        self._drawn: list[tuple[int, int]] = []
        """Of every draw so far its source, and how many of that source's came before."""
        self._counts = dict.fromkeys(self.epochs, 0)

    def next(self, step: int, signals: Mapping[str, float], asker: Asker) -> Draw:
        first = step * self.per_step
        return Draw([self._at(i) for i in range(first, first + self.per_step)])

    def _at(self, index: int) -> Prompt:
        if not self.shares:
            return self.epochs[0].at(index)
        while len(self._drawn) <= index:
            total = len(self._drawn) + 1
            source = max(self.shares, key=lambda k: self.shares[k] * total - self._counts[k])
            self._drawn.append((source, self._counts[source]))
            self._counts[source] += 1
        source, place = self._drawn[index]
        return self.epochs[source].at(place)


class Epochs:
    """Prompts without end: every one once, then every one again in another order."""

    def __init__(self, prompts: Sequence[Prompt], seed: str):
        self.prompts, self.seed = prompts, seed
        self._epoch, self._order = -1, [0]

    def at(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self.prompts))
        if epoch != self._epoch:
            # Kept, since shuffling thousands of prompts anew for each one costs more than a small model's step.
            self._epoch, self._order = epoch, list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self.prompts[self._order[place]]
