"""Register machines, in words: `a 3 b 7 ; add a b ; inc b ; show b :` -> `b is 0 ; b is 1 ; # 1`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, get_args

from pydantic import Field

from opd.procedural.base import Formats, Range, Task

REGISTERS = "abcdef"

Instruction = Literal["add", "sub", "copy", "inc", "dec"]
TWO_REGISTERS: dict[str, Callable[[int, int], int]] = {
    "add": lambda source, target: target + source,
    "sub": lambda source, target: target - source,
    "copy": lambda source, target: source,
}
ONE_REGISTER: dict[str, Callable[[int], int]] = {"inc": lambda target: target + 1, "dec": lambda target: target - 1}


class RegisterMachine(Task):
    """Run instructions on registers modulo 10 and tell one register that was written to.

    `add a b`, `sub a b` and `copy a b` write to `b`. Writings of a step: `b is 0` (the register written to),
    `3 0` (all registers, in order).
    """

    kind: Literal["register_machine"] = "register_machine"
    symbols: ClassVar = (*REGISTERS, *"0123456789;:#", "is", "show", *TWO_REGISTERS, *ONE_REGISTER)
    words: ClassVar = True
    writings: ClassVar = ("written", "state")

    formats: Formats = Field({"written": 1.0})
    registers: int = Field(3, ge=2, le=len(REGISTERS), description="Of the machine")
    instructions: Range = Field((2, 5), description="Instructions of a program; the difficulty")
    allowed: list[Instruction] = Field(
        list(get_args(Instruction)), min_length=1, description="Instructions that programs are made of"
    )

    def draw(self, rng: random.Random) -> str:
        names = REGISTERS[: self.registers]
        lines, written = [" ".join(f"{name} {rng.randrange(10)}" for name in names)], []
        for _ in range(rng.randint(*self.instructions)):
            instruction = rng.choice(self.allowed)
            registers = rng.sample(names, 2 if instruction in TWO_REGISTERS else 1)
            lines.append(" ".join([instruction, *registers]))
            written.append(registers[-1])
        return " ; ".join([*lines, f"show {rng.choice(written)} :"])

    def answer(self, prompt: str) -> str:
        return str(self._run(prompt)[-1][1][prompt.split()[-2]])

    def difficulty(self, prompt: str) -> int:
        return prompt.count(";") - 1

    def steps(self, prompt: str) -> Sequence[tuple[str, ...]]:
        return [(f"{name} is {state[name]}", " ".join(map(str, state.values()))) for name, state in self._run(prompt)]

    @staticmethod
    def _run(prompt: str) -> list[tuple[str, dict[str, int]]]:
        """After each instruction: the register written to, and all registers."""
        start, *program, _ = (line.split() for line in prompt.split(";"))
        state, trace = {name: int(value) for name, value in zip(start[::2], start[1::2], strict=True)}, []
        for instruction, *registers in program:
            target = registers[-1]
            if instruction in TWO_REGISTERS:
                value = TWO_REGISTERS[instruction](state[registers[0]], state[target])
            else:
                value = ONE_REGISTER[instruction](state[target])
            state = {**state, target: value % 10}
            trace.append((target, state))
        return trace
