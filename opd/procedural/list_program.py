"""Programs on a short list of digits: `3142|rsd:` -> `r2413;s1234;d234;#234`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, get_args

from pydantic import Field, field_validator

from opd.procedural.base import Formats, Range, Task

Digits = list[int]
Operation = Literal["reverse", "sort", "increment", "push", "drop", "trim", "swap", "add"]

OPERATIONS: dict[str, tuple[str, int, Callable[[Digits], Digits]]] = {
    "reverse": ("r", 1, lambda d: d[::-1]),
    "sort": ("s", 1, lambda d: sorted(d)),
    "increment": ("i", 1, lambda d: [(x + 1) % 10 for x in d]),
    "push": ("p", 1, lambda d: [d[0], *d]),
    "drop": ("d", 2, lambda d: d[1:]),
    "trim": ("t", 2, lambda d: d[:-1]),
    "swap": ("x", 2, lambda d: [d[1], d[0], *d[2:]]),
    "add": ("a", 2, lambda d: [(d[0] + d[1]) % 10, *d[2:]]),
}
"""Name: letter, shortest list that it takes, what it does. `push` copies the first digit, `drop` and `trim` take the
first and the last away, `swap` and `add` work on the first two (modulo 10)."""

BY_LETTER = {letter: function for letter, _, function in OPERATIONS.values()}


class ListProgram(Task):
    """Apply one operation after the other. Writings of a step: `r2413` (operation and list), `2413` (the list)."""

    kind: Literal["list_program"] = "list_program"
    symbols: ClassVar = (*"0123456789|;:#", *BY_LETTER)
    writings: ClassVar = ("named", "list")

    formats: Formats = Field({"named": 1.0})
    length: Range = Field((3, 5), description="Digits of the list at the start")
    operations: Range = Field((2, 4), description="Operations of a program; the difficulty")
    allowed: list[Operation] = Field(list(get_args(Operation)), description="Operations that programs are made of")

    @field_validator("allowed")
    @classmethod
    def _never_stuck(cls, value: list[Operation]) -> list[Operation]:
        if not any(OPERATIONS[name][1] == 1 for name in value):
            raise ValueError("a list of one digit needs one of reverse, sort, increment, push; add one of them")
        return value

    def draw(self, rng: random.Random) -> str:
        digits = [rng.randrange(10) for _ in range(rng.randint(*self.length))]
        start, program = "".join(map(str, digits)), ""
        for _ in range(rng.randint(*self.operations)):
            fitting = [OPERATIONS[name] for name in self.allowed if OPERATIONS[name][1] <= len(digits)]
            letter, _, function = rng.choice(fitting)
            digits, program = function(digits), program + letter
        return f"{start}|{program}:"

    def answer(self, prompt: str) -> str:
        return self.steps(prompt)[-1][1]

    def difficulty(self, prompt: str) -> int:
        return len(prompt[:-1].split("|")[1])

    def steps(self, prompt: str) -> Sequence[tuple[str, ...]]:
        start, program = prompt[:-1].split("|")
        digits, steps = [int(d) for d in start], []
        for letter in program:
            digits = BY_LETTER[letter](digits)
            text = "".join(map(str, digits))
            steps.append((letter + text, text))
        return steps
