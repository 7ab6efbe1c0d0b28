"""Prompts that the student solves sometimes come more often (Uni-OPD's offline balancing)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.curricula.base import Asker, Course, Curriculum, Draw
from opd.curricula.shuffled import ShuffledCourse
from opd.errors import DataError
from opd.prompts import Prompt

ALL = "all"
"""What prompts without a column to tell them apart are counted under."""

BLOCK = 8
"""Prompts that are answered together, as a multiple of a step's."""


class Difficulty(Curriculum):
    """Before the first step the student answers every prompt `responses` times, and the right ones among them are
    counted. A prompt with c right ones stands `r_c = min(most, n / n_c)` times in the set that is then shuffled, with
    `n_c` prompts of that count and `n` the larger of the two ends, all wrong and all right: the whole part of it as
    copies, the rest as the probability of one more.

    No prompt is ever taken out. Prompts that are never solved are not repeated. Those that always are, are repeated
    where the counts fall towards that end (a mirrored J) and not where they rise again (a U). Prompts without a verdict
    stand once. The answers are drawn as those to held-out prompts; they cost `responses` rollouts a prompt, once.
    """

    kind: Literal["difficulty"] = "difficulty"
    needs_reward: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("curriculum/solved_before",)
    responses: int = Field(8, ge=2, description="Answers to each prompt before training")
    budget: int | None = Field(None, ge=1, description="Most actions of such an answer; default the rollout's")
    most: float = Field(4.0, ge=1, description="Most copies of a prompt")
    right_from: float = Field(1.0, description="Least reward of a right answer")
    by: str | None = Field(None, description="Column whose values are balanced apart, as of domains; default together")

    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context) -> DifficultyCourse:
        for prompt in prompts:
            if self.by is not None and self.by not in prompt.fields:
                raise DataError(
                    f"{prompt.where}: no column {self.by!r}, which curriculum.by balances by; the row has "
                    f"{prompt.columns}"
                )
        return DifficultyCourse(self, prompts, per_step, context.seed)


def repeat_factors(counts: Sequence[int], most: float) -> list[float]:
    """How often a prompt of each count stands in the balanced set, from the number of prompts `counts[c]` of each; 1
    where there is none."""
    ends = max(counts[0], counts[-1])
    rises = counts[-1] > counts[-2]
    factors = []
    for right, count in enumerate(counts):
        repeated = count and right > 0 and (right < len(counts) - 1 or not rises)
        factors.append(max(1.0, min(most, ends / count)) if repeated else 1.0)
    return factors


class DifficultyCourse(Course):
    """A built curriculum. State: how many answers to each prompt were right, so that a run that goes on asks nothing
    again."""

    def __init__(self, settings: Difficulty, prompts: Sequence[Prompt], per_step: int, seed: int):
        self.settings, self.prompts, self.per_step, self.seed = settings, prompts, per_step, seed
        self.right: dict[str, int] = {}
        self.inner: ShuffledCourse | None = None

    def next(self, step: int, signals: Mapping[str, float], asker: Asker) -> Draw:
        found: dict[str, float] = {}
        if self.inner is None:
            self.right = self._asked(asker)
            found = self._balance()
        assert self.inner is not None
        draw = self.inner.next(step, signals, asker)
        known = [self.right[p.id] / self.settings.responses for p in draw.prompts if p.id in self.right]
        if known:
            found["curriculum/solved_before"] = sum(known) / len(known)
        return Draw(draw.prompts, signals=found)

    def _asked(self, asker: Asker) -> dict[str, int]:
        """Right answers to each prompt, without those that got no verdict."""
        found: dict[str, int] = {}
        size = BLOCK * self.per_step
        # What would be left over goes with the last block, which no process may be without.
        starts = range(0, max(1, len(self.prompts) - len(self.prompts) % size), size)
        for start in starts:
            block = self.prompts[start : None if start == starts[-1] else start + size]
            with asker.working(
                f"curriculum difficulty: {self.settings.responses} answers to each of the prompts {start + 1} to "
                f"{start + len(block)} of {len(self.prompts)}"
            ):
                made = asker.roll_out(block, self.settings.responses, self.settings.budget)
            rewards = torch.full((len(made),), torch.nan) if made.rewards is None else made.rewards
            of_prompts = asker.gather(made, rewards).view(len(block), self.settings.responses)
            for prompt, row in zip(block, of_prompts, strict=True):
                if not row.isnan().all():
                    found[prompt.id] = int((row >= self.settings.right_from).sum())
        return found

    def _balance(self) -> dict[str, float]:
        """Repeat the prompts by the counts; what is logged of it."""
        groups = {p.id: ALL if self.settings.by is None else str(p.fields[self.settings.by]) for p in self.prompts}
        tables: dict[str, Counter[int]] = {}
        for name, count in self.right.items():
            tables.setdefault(groups[name], Counter())[count] += 1
        factors: dict[str, list[float]] = {}
        signals: dict[str, float] = {}
        for tag, table in tables.items():
            counts = [table[c] for c in range(self.settings.responses + 1)]
            factors[tag] = repeat_factors(counts, self.settings.most)
            place = "" if self.settings.by is None else f"{tag}/"
            signals |= {f"curriculum/prompts/{place}{c}": float(n) for c, n in enumerate(counts)}
            signals |= {f"curriculum/repeats/{place}{c}": factor for c, factor in enumerate(factors[tag])}
        repeated: list[Prompt] = []
        balanced: Counter[tuple[str, int]] = Counter()
        for prompt in self.prompts:
            right = self.right.get(prompt.id)
            factor = 1.0 if right is None else factors[groups[prompt.id]][right]
            whole = math.floor(factor)
            more = random.Random(f"difficulty/{self.seed}/{prompt.id}").random() < factor - whole
            repeated += [prompt] * (whole + more)
            if right is not None:
                balanced[groups[prompt.id], right] += whole + more
        for tag in tables:
            place = "" if self.settings.by is None else f"{tag}/"
            counted = range(self.settings.responses + 1)
            signals |= {f"curriculum/balanced/{place}{c}": float(balanced[tag, c]) for c in counted}
        self.inner = ShuffledCourse(repeated, self.per_step, self.seed)
        return {**signals, "curriculum/prompts_balanced": float(len(repeated))}

    def state_dict(self) -> dict[str, Any]:
        return {"right": self.right} if self.inner is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.right = dict(state["right"])
            self._balance()
