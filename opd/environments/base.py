"""Environments: what an episode is to whoever plays it, whether the agent moves an arm or answers in words."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from opd.choice import Choice, OneOf, kind_of
from opd.errors import DataError, first_line
from opd.prompts.base import Prompt

O = TypeVar("O")  # noqa: E741  # the observation's type, as the field writes it
A = TypeVar("A")


@dataclass(frozen=True)
class Start:
    """What an episode begins from; in an environment that repeats itself, all that it depends on beside the actions.

    Attributes:
        task: one of `Environment.tasks`.
        seed: of the initial state; episodes of a group share it.
        draw: of whatever is random afterwards (noise of the actuators), each episode's own.
    """

    task: str
    seed: int
    draw: int = 0


@dataclass(frozen=True)
class Turn(Generic[O]):
    """What an environment says after a reset or an action.

    Attributes:
        observation: what the agent sees before it acts next.
        outcome: of the episode as far as it is known: 1 is success. It is what a rollout's reward is made of.
        done: the episode is over by itself; nothing that follows counts.
        cut: the episode is over because it was too long.
    """

    observation: O
    outcome: float = 0.0
    done: bool = False
    cut: bool = False

    @property
    def over(self) -> bool:
        return self.done or self.cut


COLUMNS = ("environment", "task", "seed")
"""What a row needs of which an episode is played; prompts of kind `episodes` write them."""


class World(ABC, Generic[O, A]):
    """A built environment, in which one episode is played at a time."""

    @abstractmethod
    def reset(self, start: Start) -> Turn[O]:
        """Begin an episode."""

    @abstractmethod
    def step(self, action: A) -> Turn[O]:
        """Go on by one action."""

    def close(self) -> None:
        """Nothing is played here any more."""


class Environment(Choice):
    """Base of the axis. Settings are plain data: another process builds the same world from them."""

    axis: ClassVar[str] = "environment"
    repeats: ClassVar[bool | None] = None
    """Whether an episode depends on its start and its actions alone; None where that has to be tried. Then a run goes
    on bit for bit after a stop: no episode lasts longer than a step, and what a world holds between two is forgotten by
    `reset`."""

    @property
    def remote(self) -> str | None:
        """The package that is needed even to list its tasks and is not installed; None where nothing is lacking."""
        return None

    @abstractmethod
    def tasks(self) -> Mapping[str, str]:
        """What is to be done in it: the instruction of each task by the task's name."""

    @classmethod
    def of(cls, prompt: Prompt) -> Self:
        """The settings of the environment that a row's episodes are played in.

        Raises:
            DataError: the row names none, or one of another kind than this class.
        """
        lacking = next((column for column in COLUMNS if column not in prompt.fields), None)
        if lacking is not None:
            raise DataError(
                f"{prompt.where}: no column {lacking!r}, so no episode can be played from this row; take prompts of "
                "kind episodes"
            )
        try:
            found = named(json.dumps(prompt.fields["environment"], sort_keys=True))
        except (ValidationError, TypeError) as error:
            raise DataError(f"{prompt.where}: column 'environment' names none ({first_line(error)})") from None
        if not isinstance(found, cls):
            raise DataError(
                f"{prompt.where}: environment {kind_of(found)!r} is for students of {found.modality} models, and a "
                f"rollout of {cls.modality} models plays here; take an environment of those"
            )
        return found

    def columns(self, task: str) -> Mapping[str, Any]:
        """Further columns of a task's rows, as the tools that an agent may call."""
        return {}

    @abstractmethod
    def build(self) -> World:
        """Make a world, in the process that plays in it.

        Raises:
            ModelError: what it is made of is not installed.
        """

    @abstractmethod
    def says_the_same(self) -> bool:
        """Whether two short episodes of one start and the same actions are the same; asked where `repeats` is None."""


@lru_cache
def named(text: str) -> Environment:
    """An environment's settings from what `model_dump` made of them, as JSON."""
    adapter: Any = TypeAdapter(Annotated[Environment, OneOf(Environment)])
    found: Environment = adapter.validate_python(json.loads(text))
    return found
