"""Running sum modulo 10: `3582:` -> `3+5=8;8+8=6;6+2=8;#8`. With several writings a step is multimodal."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from opd.procedural.base import Formats, Range, Task


class RunningSum(Task):
    """Add up digits modulo 10, one step a digit after the first. Writings of a step: `3+5=8`, `5+3=8`, `8`."""

    kind: Literal["running_sum"] = "running_sum"
    symbols: ClassVar = tuple("0123456789+=;:#")
    writings: ClassVar = ("sum", "swapped", "result")

    formats: Formats = Field({"sum": 0.45, "swapped": 0.35, "result": 0.2})
    terms: Range = Field((6, 12), description="Digits to add up; the difficulty")

    def draw(self, rng: random.Random) -> str:
        return "".join(str(rng.randrange(10)) for _ in range(rng.randint(*self.terms))) + ":"

    def answer(self, prompt: str) -> str:
        return str(sum(map(int, prompt[:-1])) % 10)

    def difficulty(self, prompt: str) -> int:
        return len(prompt) - 1

    def steps(self, prompt: str) -> Sequence[tuple[str, ...]]:
        a, *others = map(int, prompt[:-1])
        steps = []
        for b in others:
            c = (a + b) % 10
            steps.append((f"{a}+{b}={c}", f"{b}+{a}={c}", f"{c}"))
            a = c
        return steps
