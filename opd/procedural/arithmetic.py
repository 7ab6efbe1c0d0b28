"""Addition and subtraction, column by column from the right: `47+85:` -> `7+5+0=2c1;4+8+1=3c1;#132`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from opd.procedural.base import Formats, Range, Task


class Arithmetic(Task):
    """Two numbers of equally many digits; a difference is never negative.

    A step is one column: its digits, the carry (or borrow) that comes in, the digit that results and the carry that
    goes out. Writings: `7+5+0=2c1`, `2c1=7+5+0`, `2c1`.
    """

    kind: Literal["arithmetic"] = "arithmetic"
    symbols: ClassVar = tuple("0123456789+-=c;:#")
    writings: ClassVar = ("column", "reversed", "result")

    formats: Formats = Field({"column": 1.0})
    digits: Range = Field((2, 4), description="Digits of each number; the difficulty")
    operations: list[Literal["+", "-"]] = Field(["+", "-"], min_length=1, description="That expressions are made of")

    def draw(self, rng: random.Random) -> str:
        digits = rng.randint(*self.digits)
        smallest = 10 ** (digits - 1) if digits > 1 else 0
        a, b = (rng.randrange(smallest, 10**digits) for _ in range(2))
        operation = rng.choice(self.operations)
        return f"{max(a, b)}-{min(a, b)}:" if operation == "-" else f"{a}+{b}:"

    def answer(self, prompt: str) -> str:
        a, operation, b = self._parts(prompt)
        return str(int(a) + int(b) if operation == "+" else int(a) - int(b))

    def difficulty(self, prompt: str) -> int:
        return len(self._parts(prompt)[0])

    def steps(self, prompt: str) -> Sequence[tuple[str, ...]]:
        left, sign, right = self._parts(prompt)
        carry, steps = 0, []
        for a, b in zip(reversed(left), reversed(right), strict=True):
            total = int(a) + int(b) + carry if sign == "+" else int(a) - int(b) - carry
            column = f"{a}{sign}{b}{sign}{carry}"
            carry = int(not 0 <= total < 10)
            result = f"{total % 10}c{carry}"
            steps.append((f"{column}={result}", f"{result}={column}", result))
        return steps

    @staticmethod
    def _parts(prompt: str) -> tuple[str, str, str]:
        a, operation, b = re.split(r"([+-])", prompt[:-1])
        return a, operation, b
