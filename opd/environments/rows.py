"""Environments in rows of prompts: which one an episode of a row is played in, and from where."""

from __future__ import annotations

import json
from functools import lru_cache

from opd.acting.seeing import Body
from opd.environments.base import Environment, Start, named
from opd.environments.control import Control
from opd.prompts import Prompt


def start_of(prompt: Prompt, draw: int) -> Start:
    """Where a row's episodes begin; `draw` is one episode's own."""
    return Start(str(prompt.fields["task"]), int(prompt.fields["seed"]), draw)


def body_of(environment: Control) -> Body:
    """How an environment is seen and moved; found once, since some must be made for that."""
    return _body(json.dumps(environment.model_dump(mode="json"), sort_keys=True))


def repeats(environment: Environment) -> bool:
    """Whether an environment says the same again to the same start and actions: what it says of itself, or what two
    short episodes show."""
    if environment.repeats is not None:
        return environment.repeats
    return _repeats(json.dumps(environment.model_dump(mode="json"), sort_keys=True))


@lru_cache
def _repeats(text: str) -> bool:
    return named(text).says_the_same()


@lru_cache
def _body(text: str) -> Body:
    found = named(text)
    assert isinstance(found, Control)
    return found.body()
