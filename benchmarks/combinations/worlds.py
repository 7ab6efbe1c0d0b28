"""What blank models succeed in about half of the time, so that verdicts differ: a line to walk, pictures to be bright,
texts by their checksum, a door to talk open.

They are choices of their axes, defined here: recipes of this process accept them once this file is imported.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from opd.acting.seeing import NO_PICTURE, Body, Plan, Seen
from opd.environments import Start, Turn
from opd.environments.control import Control, ControlWorld
from opd.environments.text import TextEnvironment, TextWorld
from opd.language.calls import Reply
from opd.prompts import Prompt
from opd.prompts.messages import Messages
from opd.verifiers import CompletionVerifier


class Coin(CompletionVerifier):
    """1 for about half of all texts, whatever they say: always the same ones."""

    kind: Literal["coin"] = "coin"
    modality: ClassVar[str | None] = "language"

    def score(self, prompt: Prompt, completion: Any) -> float | None:
        return float(zlib.crc32(f"{prompt.id}/{completion}".encode()) % 2)


class Bright(CompletionVerifier):
    """1 for a picture that is brighter than grey."""

    kind: Literal["bright"] = "bright"
    modality: ClassVar[str | None] = "flow"

    def score(self, prompt: Prompt, completion: Any) -> float | None:
        return float(completion.mean() > 0.5)


class Walk(Control):
    """A point on a line is to come near its middle."""

    kind: Literal["walk"] = "walk"
    expert: ClassVar[bool] = True
    repeats: ClassVar[bool | None] = True

    def tasks(self) -> Mapping[str, str]:
        return {"middle": "go there", "centre": "go here"}

    def body(self) -> Body:
        return Body(low=(-0.5,), high=(0.5,), proprio=1, state=1)

    def build(self) -> WalkWorld:
        return WalkWorld(self)


class WalkWorld(ControlWorld):
    """The built line."""

    def __init__(self, settings: Walk):
        self.settings = settings

    def reset(self, start: Start) -> Turn[Seen]:
        self.place = np.random.default_rng(start.seed).choice([-1, 1], 1) * (0.3 + 0.1 * (start.seed % 8))
        self.steps = 0
        return self._turn()

    def step(self, action: np.ndarray) -> Turn[Seen]:
        self.place, self.steps = self.place + action, self.steps + 1
        return self._turn()

    def _turn(self) -> Turn[Seen]:
        numbers, there = self.place.astype(np.float32), bool(abs(self.place[0]) < 0.2)
        cut = not there and self.steps >= self.settings.limit
        return Turn(Seen(NO_PICTURE, numbers, numbers), outcome=float(there), done=there, cut=cut)

    def plan(self, horizon: int) -> Plan:
        mean = np.zeros((horizon, 1), np.float32)
        mean[0] = -self.place.clip(-0.5, 0.5)
        return Plan(mean, np.full_like(mean, 0.05))


class Door(TextEnvironment):
    """A door that opens to every third word or so."""

    kind: Literal["door"] = "door"
    expert: ClassVar[bool] = True
    repeats: ClassVar[bool | None] = True

    def tasks(self) -> Mapping[str, str]:
        return {"front": "0+1=", "back": "1+1="}

    def build(self) -> DoorWorld:
        return DoorWorld()


class DoorWorld(TextWorld):
    """The built door."""

    def reset(self, start: Start) -> Turn[Messages]:
        self.start = start
        return self._turn(f"{start.seed % 6}+{len(start.task) % 6}=", False)

    def step(self, action: Reply) -> Turn[Messages]:
        return self._turn("?", self._opens(action.text))

    def _opens(self, word: str) -> bool:
        return zlib.crc32(f"{self.start.task}/{self.start.seed}/{word}".encode()) % 3 == 0

    def _turn(self, text: str, opened: bool) -> Turn[Messages]:
        return Turn([{"role": "user", "content": text}], outcome=float(opened), done=opened)

    def expert(self) -> Reply:
        return Reply(next(word for word in map(str, range(1000)) if set(word) <= set("012345") and self._opens(word)))
