"""A register machine with two families of tools, played in words, and what two teachers hold about it.

The machine says its register and the tool that is wanted next, `3u`; the agent calls that tool with the digit which the
family's code makes of the register, `u9`. A right call puts that digit into the register, `9v`. Any other call jams the
machine, `x`, and only `r` frees it, with another register and the same tool, `5v`. Four right calls, two of each
family, within six are a success.

Teacher A knows family u and has half of v wrong, teacher B knows v and has six tenths of u wrong, always in the same
way, by the codes of the debate on a single turn. Behind a debate a teacher takes the word of the one who knows the
family. There are beliefs that it gives up only when the other has said so twice, and some that it never gives up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from opd.environments import Start, Turn
from opd.environments.text import TextEnvironment, TextWorld
from opd.language.calls import Reply
from opd.prompts.messages import Messages, text_of
from reproductions.mad_opd_models import EXPERTS, KNOWS, WRONG, Expert, believed, right

FAMILIES = "uuvv"
"""What an episode takes, in an order of its own."""
SPARE = 2
JAM, REPAIR = "x", "r"
FIRM, LATE = 2, 3
"""Wrong beliefs about registers below `FIRM` are never given up, those below `LATE` behind two rounds, others behind
one."""


class State(NamedTuple):
    """What is to be answered: the tool that is wanted and the register, or a jam (`tool` is x and `register` 0)."""

    tool: str
    register: int


# -- the environment ---------------------------------------------------------------------------------------------------


class TwoTools(TextEnvironment):
    """Four calls of two families of tools, whose results an agent has to know; wrong ones jam the machine."""

    kind: Literal["two_tools"] = "two_tools"
    expert: ClassVar[bool] = True
    repeats: ClassVar[bool | None] = True
    spare: int = Field(SPARE, ge=0, description="Calls beyond four after which an episode is over")

    def tasks(self) -> Mapping[str, str]:
        return {"work": FAMILIES}

    def build(self) -> Machine:
        return Machine(self)


class Machine(TextWorld):
    """The built environment."""

    def __init__(self, settings: TwoTools):
        self.settings = settings

    def reset(self, start: Start) -> Turn[Messages]:
        self.rng = random.Random(f"{start.task}/{start.seed}")
        self.wanted = self.rng.sample(FAMILIES, len(FAMILIES))
        self.register, self.jammed, self.calls = self.rng.randrange(10), False, 0
        return self._says()

    def step(self, action: Reply) -> Turn[Messages]:
        self.calls += 1
        if action.text != self.expert().text:
            self.jammed = True
        elif self.jammed:
            self.register, self.jammed = self.rng.randrange(10), False
        else:
            self.register = right(self.wanted.pop(0), self.register)
        if not self.wanted:
            return Turn([], 1.0, done=True)
        if self.calls == len(FAMILIES) + self.settings.spare:
            return Turn([], cut=True)
        return self._says()

    def _says(self) -> Turn[Messages]:
        text = JAM if self.jammed else f"{self.register}{self.wanted[0]}"
        return Turn([{"role": "user", "content": text}])

    def expert(self) -> Reply:
        return Reply(right_call(State(JAM if self.jammed else self.wanted[0], self.register)))


def state_of(messages: Messages) -> State:
    """What the last message asks for."""
    text = text_of(messages[-1].get("content"))
    return State(JAM, 0) if text == JAM else State(text[-1], int(text[0]))


def right_call(state: State) -> str:
    return REPAIR if state.tool == JAM else f"{state.tool}{right(state.tool, state.register)}"


def played(seed: int, answer: Callable[[State], str]) -> list[tuple[Messages, str]]:
    """An episode: what was said before each call, and the call."""
    world = TwoTools().build()
    turn = world.reset(Start("work", seed))
    messages, found = list(turn.observation), list[tuple[Messages, str]]()
    while not turn.over:
        said = answer(state_of(messages))
        found.append((list(messages), said))
        turn = world.step(Reply(said))
        messages += [{"role": "assistant", "content": said}, *turn.observation]
    return found


# -- beliefs -----------------------------------------------------------------------------------------------------------


def alone(expert: Expert, state: State) -> str:
    """What a teacher calls by itself; both know how to free the machine."""
    return REPAIR if state.tool == JAM else f"{state.tool}{believed(expert, state.tool, state.register)}"


def sure(expert: Expert, state: State) -> int:
    """How often it is right by itself about such tools, of 99."""
    return 99 if state.tool in (JAM, KNOWS[expert]) else round(99 * (1 - WRONG[expert] / 10))


def gives_in(expert: Expert, state: State, rounds: int) -> bool:
    """Whether behind so many rounds a teacher takes the other's word."""
    if state.tool in (JAM, KNOWS[expert]) or state.register < FIRM:
        return False
    return rounds >= (2 if state.register < LATE else 1)


def settled(expert: Expert, state: State, rounds: int) -> str:
    """What a teacher says behind so many rounds: its own word, or the other's."""
    (other,) = (name for name in EXPERTS if name != expert)
    return alone(other if gives_in(expert, state, rounds) else expert, state)


def texts(state: State, rounds: int) -> list[tuple[str, ...]]:
    """What both write in so many rounds, each with its tag."""
    return [tuple(f"{settled(name, state, r)}c{sure(name, state)}" for name in EXPERTS) for r in range(rounds)]
