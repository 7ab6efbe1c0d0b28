"""Each prompt by itself, with one probability: draws whose size varies, as privacy amplification by sampling wants."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from opd.context import Context
from opd.curricula.base import Asker, Course, Curriculum, Draw
from opd.errors import DataError
from opd.prompts import Prompt


class Poisson(Curriculum):
    """Each prompt is in a step's draw with probability `batch.prompts / prompts`, whatever the other prompts and steps
    drew; so a draw has `batch.prompts` prompts in expectation, and may have none.

    Who knows which draws a record is in needs less noise to be seen through. So the draws are those of the operating
    system, other ones in each process of a run, and in no checkpoint, unless a `seed` is given.
    """

    kind: Literal["poisson"] = "poisson"
    independent: ClassVar[bool] = True
    seed: int | None = Field(
        None, ge=0, description="Makes the draws repeatable, and known to whoever knows it; default drawn in secret"
    )

    @property
    def known(self) -> bool:
        return self.seed is not None

    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context) -> PoissonCourse:
        if per_step > len(prompts):
            raise DataError(
                f"batch.prompts is {per_step} and curriculum 'poisson' draws from {len(prompts)} prompts, each at most "
                "once a step: lower batch.prompts, or give more prompts"
            )
        weighted = next((prompt for prompt in prompts if prompt.weight is not None), None)
        if weighted is not None:
            raise DataError(
                f"{weighted.where}: its source has a weight, and curriculum 'poisson' draws every prompt with the same "
                "probability; remove prompts.weight"
            )
        return PoissonCourse(self.seed, prompts, per_step)


class PoissonCourse(Course):
    """Stateless in what a checkpoint holds."""

    def __init__(self, seed: int | None, prompts: Sequence[Prompt], per_step: int):
        self.seed, self.prompts = seed, prompts
        self.rate = per_step / len(prompts)
        self._drawn: dict[int, list[int]] = {}
        """Places of the newest steps: a step that is asked for twice, ahead and then in its turn, has one draw."""

    def next(self, step: int, signals: Mapping[str, float], asker: Asker) -> Draw:
        if step not in self._drawn:
            self._drawn = {known: places for known, places in self._drawn.items() if known == step - 1}
            self._drawn[step] = self._places(step)
        return Draw([self.prompts[place] for place in self._drawn[step]])

    def _places(self, step: int) -> list[int]:
        named = None if self.seed is None else hashlib.sha256(f"poisson/{self.seed}/{step}".encode()).digest()
        random = np.random.default_rng(secrets.randbits(128) if named is None else int.from_bytes(named[:16]))
        return (random.random(len(self.prompts)) < self.rate).nonzero()[0].tolist()
