"""A small game of text. Processes that play it read this file, which imports no torch."""

from __future__ import annotations

import os
import time
from typing import ClassVar, Literal

from pydantic import Field

from opd.environments import Start, Turn
from opd.environments.text import TextEnvironment, TextWorld
from opd.language.calls import Reply


class Guess(TextEnvironment):
    """A group of letters is to be hit: an untrained student does so now and then."""

    kind: Literal["guess"] = "guess"
    repeats: ClassVar[bool | None] = True
    expert: ClassVar[bool] = True
    misbehaves: Literal["", "crash", "hang", "raise", "begin", "over"] = Field("", description="What an episode does")

    def tasks(self):
        return {"low": "say a low one", "high": "say a high one"}

    def build(self):
        return GuessWorld(self)


class GuessWorld(TextWorld):
    def __init__(self, settings):
        self.settings = settings

    def reset(self, start: Start):
        if self.settings.misbehaves == "begin":
            raise AssertionError("there is no such game")
        self.start, self.turns = start, 0
        if self.settings.misbehaves == "over" and start.seed % 2:
            return Turn([], 1.0, done=True)
        return Turn([{"role": "user", "content": f"{start.task} {start.seed % 7}?"}])

    def step(self, action: Reply):
        self.turns += 1
        if self.settings.misbehaves and self.start.seed % 2:
            if self.settings.misbehaves == "raise":
                raise ValueError("the game is broken")
            if self.settings.misbehaves == "crash":
                os._exit(3)
            time.sleep(60)
        right = sum(map(ord, action.text[:2])) % 2 == (self.start.task == "high")
        return Turn([{"role": "user", "content": "no"}], float(right), done=right)

    def expert(self):
        return Reply("ab" if (self.turns + (self.start.task == "high")) % 2 else "aa")


class Alone(Guess):
    """The same without an expert."""

    kind: Literal["guess_alone"] = "guess_alone"
    expert: ClassVar[bool] = False
