"""Environments of text: an agent reads messages, and answers in words or by calling tools."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from opd.environments.arena import Order
from opd.environments.base import Environment, Start, Turn, World
from opd.language.calls import Reply
from opd.prompts.messages import Messages


@dataclass(frozen=True)
class Exchange:
    """What came of a reply, or of a beginning.

    Attributes:
        turn: its observation are the messages that are new: what the episode begins with, or what the environment says
            to the reply.
        played: replies that were given; 0 of a beginning.
        expert: what the environment's own expert would say next, where it was asked for and the episode goes on.
    """

    turn: Turn[Messages]
    played: int
    expert: Reply | None = None


class TextWorld(World[Messages, Reply]):
    """A built environment of text.

    Messages are those of a chat template: `role` and `content`, `tool` for what a tool returned. None has the role of
    the agent's own replies, and after a beginning and after each reply that does not end the episode there is one.
    """

    def expert(self) -> Reply:
        """What the environment's own expert would say here.

        Raises:
            NotImplementedError: there is none (`TextEnvironment.expert`).
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TextOrder(Order[Exchange]):
    """Begin an episode, or go on with a reply; `asks` the expert what it would say next."""

    place: int
    environment: TextEnvironment
    what: Start | Reply
    asks: bool = False

    @property
    def begins(self) -> bool:
        return isinstance(self.what, Start)

    def carry_out(self, world: World) -> Exchange:
        assert isinstance(world, TextWorld)
        turn = world.reset(self.what) if isinstance(self.what, Start) else world.step(self.what)
        return Exchange(turn, int(not self.begins), world.expert() if self.asks and not turn.over else None)


class TextEnvironment(Environment):
    """Base of environments of text."""

    modality: ClassVar[str | None] = "language"
    expert: ClassVar[bool] = False
    """Whether its worlds have an expert (`TextWorld.expert`)."""

    def tools(self) -> Sequence[Mapping[str, Any]]:
        """What an agent may call, as chat templates take tools; empty where it answers in words alone."""
        return ()

    def columns(self, task: str) -> Mapping[str, Any]:
        return {"tools": [dict(tool) for tool in self.tools()]} if self.tools() else {}

    @abstractmethod
    def build(self) -> TextWorld: ...

    def says_the_same(self) -> bool:
        world, task = self.build(), next(iter(self.tasks()))
        try:
            found = []
            for _ in range(2):
                turns = [world.reset(Start(task, 0))]
                while len(turns) < 4 and not turns[-1].over:
                    turns.append(world.step(Reply("look")))
                found.append(turns)
        finally:
            world.close()
        return found[0] == found[1]


def function(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """A tool as chat templates take it, all of whose parameters are needed.

    Args:
        parameters: `TYPE: DESCRIPTION` of each, with a type of JSON's schemas: `integer: how much is added`.
    """
    properties = {}
    for parameter, told in parameters.items():
        kind, _, described = told.partition(":")
        properties[parameter] = {"type": kind.strip(), "description": described.strip()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
