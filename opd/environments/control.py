"""Environments with a body: an agent sees pictures and numbers, and moves by numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from opd.acting.seeing import Body, Plan, Seen
from opd.environments.arena import Order
from opd.environments.base import Environment, Start, Turn, World


@dataclass(frozen=True)
class Chunk:
    """What came of a chunk of actions played open loop.

    Attributes:
        turn: after the last action that was played.
        played: how many of them were; behind the end of an episode none is.
        frames: uint8 `[played, h, w, 3]`, what a person would have seen after each action, where it was asked for.
        plan: what an expert would do next, where it was asked for and the episode goes on.
        seen: what was observed after each action, where it was asked for.
    """

    turn: Turn[Seen]
    played: int
    frames: np.ndarray | None = None
    plan: Plan | None = None
    seen: tuple[Seen, ...] = ()


class ControlWorld(World[Seen, np.ndarray]):
    """A built environment with a body; actions are float `[A]` within its bounds."""

    def plan(self, horizon: int) -> Plan:
        """What the environment's own expert would do from here, `horizon` actions open loop.

        Raises:
            NotImplementedError: there is none (`Control.expert`).
        """
        raise NotImplementedError

    def frame(self) -> np.ndarray | None:
        """uint8 `[h, w, 3]` for a person; None where nothing can be shown."""
        return None

    def begin(self, start: Start, horizon: int, frames: bool = False) -> Chunk:
        """Begin an episode; `horizon` is that of the expert's plan, 0 for none."""
        turn = self.reset(start)
        return Chunk(turn, 0, self._shown([], frames), self.plan(horizon) if horizon and not turn.over else None)

    def play(self, actions: np.ndarray, horizon: int, frames: bool = False, whole: bool = False) -> Chunk:
        """Play a chunk `[H, A]` until the episode is over; with `whole` every observation comes along."""
        shown: list[np.ndarray] = []
        seen: list[Seen] = []
        played = 0
        for action in actions:
            turn = self.step(action)
            played += 1
            if whole:
                seen.append(turn.observation)
            if frames and (frame := self.frame()) is not None:
                shown.append(frame)
            if turn.over:
                break
        plan = self.plan(horizon) if horizon and not turn.over else None
        return Chunk(turn, played, self._shown(shown, frames), plan, tuple(seen))

    def _shown(self, frames: list[np.ndarray], wanted: bool) -> np.ndarray | None:
        first = self.frame() if wanted and not frames else None
        frames = frames if first is None else [first]
        return np.stack(frames) if frames else None


@dataclass(frozen=True)
class ControlOrder(Order[Chunk]):
    """Begin an episode, or go on with a chunk of actions `[H, A]`.

    Attributes:
        horizon: of the expert's plan afterwards; 0 for none.
        frames: whether to show what a person would see.
        whole: whether the observation after each action is wanted.
    """

    place: int
    environment: Control
    what: Start | np.ndarray
    horizon: int = 0
    frames: bool = False
    whole: bool = False

    @property
    def begins(self) -> bool:
        return isinstance(self.what, Start)

    def carry_out(self, world: World) -> Chunk:
        assert isinstance(world, ControlWorld)
        if isinstance(self.what, Start):
            return world.begin(self.what, self.horizon, self.frames)
        return world.play(self.what, self.horizon, self.frames, self.whole)


class Control(Environment):
    """Base of environments with a body."""

    modality: ClassVar[str | None] = "action"
    expert: ClassVar[bool] = False
    """Whether its worlds have an expert (`ControlWorld.plan`)."""
    limit: int = Field(100, ge=1, description="Most environment steps of an episode")

    @property
    def longest(self) -> int:
        """Most environment steps of an episode under these settings."""
        return self.limit

    @abstractmethod
    def body(self) -> Body:
        """How it is seen and moved; of one that has to be made to be known this makes one."""

    @abstractmethod
    def build(self) -> ControlWorld: ...

    @abstractmethod
    def tasks(self) -> Mapping[str, str]: ...

    def says_the_same(self) -> bool:
        world, body = self.build(), self.body()
        action = np.array([body.low, body.high]).mean(0)
        try:
            found = []
            for _ in range(2):
                turns = [world.reset(Start(next(iter(self.tasks())), 0))]
                while len(turns) < 4 and not turns[-1].over:
                    turns.append(world.step(action))
                found.append([turn.observation for turn in turns])
        finally:
            world.close()
        return len(found[0]) == len(found[1]) and all(
            np.array_equal(a.state, b.state) and np.array_equal(a.images, b.images) for a, b in zip(*found, strict=True)
        )
