"""A machine of cells that is worked by its tools: read a cell, write a cell, until the goal is reached."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from opd.environments.base import Start, Turn
from opd.environments.text import TextEnvironment, TextWorld, function
from opd.errors import nearest
from opd.language.calls import Call, Reply
from opd.prompts.messages import Messages

TASKS = {
    "copy": "put what is in {a} into {c}",
    "sum": "put the sum of {a} and {b} into {c}",
    "larger": "put the larger of {a} and {b} into {c}",
    "swap": "swap what is in {a} and {b}",
}
"""What is asked, of three different cells."""

TOOLS = (
    function("read", "What is in a cell", cell="string: the name of the cell"),
    function("write", "Put a number into a cell", cell="string: the name of the cell", value="integer: the number"),
)
WORDS = "Answer with one command: `read CELL` or `write CELL NUMBER`."
COMMAND = re.compile(r"\s*(read)\s+([a-z])\s*|\s*(write)\s+([a-z])\s+(-?\d{1,6})\s*")


class ToolMachine(TextEnvironment):
    """Cells with hidden numbers, and a goal that takes two to four calls: what is to be written has to be read first.
    The machine itself checks after each call whether the goal is reached, and then the episode is over.

    With `style: template` the tools are given to the chat template and called in the model's own form; with `words`
    they are described in the first message, and a reply is one command, for models without such a form.
    """

    kind: Literal["tool_machine"] = "tool_machine"
    expert: ClassVar[bool] = True
    repeats: ClassVar[bool | None] = True
    only: list[str] = Field(list(TASKS), min_length=1, description="Tasks: copy, sum, larger, swap")
    cells: int = Field(4, ge=3, le=26, description="How many there are; they are called a, b, c, ...")
    largest: int = Field(9, ge=1, le=100_000, description="Of the numbers in them")
    style: Literal["template", "words"] = Field("template", description="How tools are shown and called")

    @field_validator("only")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in TASKS:
                raise ValueError(f"no task {name!r}{nearest(name, TASKS)}; there are {', '.join(TASKS)}")
        return value

    def tasks(self) -> Mapping[str, str]:
        return {name: TASKS[name].format(a="one cell", b="another", c="a third") for name in dict.fromkeys(self.only)}

    def tools(self) -> Sequence[Mapping[str, Any]]:
        return TOOLS if self.style == "template" else ()

    def build(self) -> MachineWorld:
        return MachineWorld(self)


@dataclass
class Goal:
    """What is asked, and what has to be where."""

    task: str
    names: dict[str, str]
    cells: dict[str, int]

    def told(self) -> str:
        return TASKS[self.task].format(**self.names)

    def wanted(self) -> dict[str, int]:
        """By cell, of the numbers that were there at first."""
        a, b = self.cells[self.names["a"]], self.cells[self.names["b"]]
        if self.task == "swap":
            return {self.names["a"]: b, self.names["b"]: a}
        return {self.names["c"]: {"copy": a, "sum": a + b, "larger": max(a, b)}[self.task]}

    def reads(self) -> list[str]:
        """Cells that have to be read before."""
        return [self.names[name] for name in ("a", "b")[: 1 if self.task == "copy" else 2]]


class MachineWorld(TextWorld):
    """The built environment."""

    def __init__(self, settings: ToolMachine):
        self.settings = settings

    def reset(self, start: Start) -> Turn[Messages]:
        rng = random.Random(f"{start.task}/{start.seed}")
        letters = "abcdefghijklmnopqrstuvwxyz"[: self.settings.cells]
        names = dict(zip("abc", rng.sample(letters, 3), strict=True))
        while True:
            cells = {letter: rng.randint(0, self.settings.largest) for letter in letters}
            self.goal = Goal(start.task, names, cells)
            # What is there already would be solved by doing nothing.
            if any(cells[cell] != value for cell, value in self.goal.wanted().items()):
                break
        self.cells, self.known = dict(cells), set[str]()
        told = f"There are cells {letters[0]} to {letters[-1]}, and each holds a number. Task: {self.goal.told()}."
        if self.settings.style == "words":
            told = f"{told} {WORDS}"
        return Turn([{"role": "user", "content": told}])

    def step(self, action: Reply) -> Turn[Messages]:
        if self.settings.style == "words":
            said = self._word(action.text)
            messages: Messages = [{"role": "user", "content": said}]
        elif action.calls and action.fault is None:
            messages = [{"role": "tool", "name": c.name, "content": self._do(c)} for c in action.calls]
        else:
            told = f"error: {action.fault}" if action.fault else "error: no tool was called"
            messages = [{"role": "tool", "name": "error", "content": told}]
        done = all(self.cells[cell] == value for cell, value in self.goal.wanted().items())
        return Turn(messages, float(done), done)

    def _word(self, text: str) -> str:
        found = COMMAND.fullmatch(text.lower())
        if found is None:
            return "error: this is no command"
        read, read_cell, _, cell, value = found.groups()
        if read:
            return self._do(Call("read", {"cell": read_cell}))
        return self._do(Call("write", {"cell": cell, "value": int(value)}))

    def _do(self, call: Call) -> str:
        cell, value = call.arguments.get("cell"), call.arguments.get("value")
        if call.name not in ("read", "write"):
            return f"error: there is no tool {call.name[:40]!r}"
        if not isinstance(cell, str) or cell not in self.cells:
            return f"error: there is no cell {str(cell)[:40]!r}"
        if call.name == "read":
            self.known.add(cell)
            return str(self.cells[cell])
        if not isinstance(value, int) or isinstance(value, bool):
            return "error: value is no whole number"
        self.cells[cell] = value
        return "done"

    def expert(self) -> Reply:
        """Reads what it has not read, and then writes what is lacking."""
        unread = [cell for cell in self.goal.reads() if cell not in self.known]
        if unread:
            return self._said(Call("read", {"cell": unread[0]}))
        cell, value = next(item for item in self.goal.wanted().items() if self.cells[item[0]] != item[1])
        return self._said(Call("write", {"cell": cell, "value": value}))

    def _said(self, call: Call) -> Reply:
        if self.settings.style == "template":
            return Reply("", (call,))
        return Reply(" ".join([call.name, *map(str, call.arguments.values())]))
