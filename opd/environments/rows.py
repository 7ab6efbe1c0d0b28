"""Environments in rows of prompts: which one an episode of a row is played in, and from where."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from opd.acting.seeing import Body
from opd.choice import OneOf
from opd.environments.base import Environment, Start
from opd.environments.control import Control
from opd.errors import DataError, first_line
from opd.prompts import Prompt

COLUMNS = ("environment", "task", "seed")
"""What a row needs of which an episode is played; prompts of kind `episodes` write them."""


def environment_of(prompt: Prompt) -> Control:
    """The settings of a row's environment.

    Raises:
        DataError: the row names none.
    """
    lacking = next((column for column in COLUMNS if column not in prompt.fields), None)
    if lacking is not None:
        raise DataError(
            f"{prompt.where}: no column {lacking!r}, so no episode can be played from this row; take prompts of kind "
            "episodes"
        )
    try:
        return _environment(json.dumps(prompt.fields["environment"], sort_keys=True))
    except (ValidationError, TypeError) as error:
        raise DataError(f"{prompt.where}: column 'environment' names none ({first_line(error)})") from None


def start_of(prompt: Prompt, draw: int) -> Start:
    """Where a row's episodes begin; `draw` is one episode's own."""
    return Start(str(prompt.fields["task"]), int(prompt.fields["seed"]), draw)


@lru_cache
def _environment(text: str) -> Control:
    adapter: Any = TypeAdapter(Annotated[Environment, OneOf(Environment)])
    found = adapter.validate_python(json.loads(text))
    if not isinstance(found, Control):
        raise TypeError(f"{type(found).__name__} has no body to act with")
    return found


def body_of(environment: Control) -> Body:
    """How an environment is seen and moved; found once, since some must be made for that."""
    return _body(json.dumps(environment.model_dump(mode="json"), sort_keys=True))


def repeats(environment: Control) -> bool:
    """Whether an environment says the same again to the same start and actions: what it says of itself, or what two
    short episodes show."""
    if environment.repeats is not None:
        return environment.repeats
    return _repeats(json.dumps(environment.model_dump(mode="json"), sort_keys=True))


@lru_cache
def _repeats(text: str) -> bool:
    environment = _environment(text)
    world, body = environment.build(), _body(text)
    action = np.array([body.low, body.high]).mean(0)
    try:
        found = []
        for _ in range(2):
            turns = [world.reset(Start(next(iter(environment.tasks())), 0))]
            while len(turns) < 4 and not turns[-1].over:
                turns.append(world.step(action))
            found.append([turn.observation for turn in turns])
    finally:
        world.close()
    return len(found[0]) == len(found[1]) and all(
        np.array_equal(a.state, b.state) and np.array_equal(a.images, b.images) for a, b in zip(*found, strict=True)
    )


@lru_cache
def _body(text: str) -> Body:
    return _environment(text).body()
