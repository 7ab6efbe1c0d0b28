"""Environments in rows of prompts: which one an episode of a row is played in, and from where."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from opd.acting.seeing import Body
from opd.choice import OneOf, kind_of
from opd.environments.base import Environment, Start
from opd.environments.control import Control
from opd.errors import DataError, first_line
from opd.prompts import Prompt

E = TypeVar("E", bound=Environment)

COLUMNS = ("environment", "task", "seed")
"""What a row needs of which an episode is played; prompts of kind `episodes` write them."""


def environment_of(prompt: Prompt, base: type[E]) -> E:
    """The settings of a row's environment.

    Args:
        base: what kind of environment whoever plays can act in: one with a body, or one of text.

    Raises:
        DataError: the row names none, or one of another kind.
    """
    lacking = next((column for column in COLUMNS if column not in prompt.fields), None)
    if lacking is not None:
        raise DataError(
            f"{prompt.where}: no column {lacking!r}, so no episode can be played from this row; take prompts of kind "
            "episodes"
        )
    try:
        found = _environment(json.dumps(prompt.fields["environment"], sort_keys=True))
    except (ValidationError, TypeError) as error:
        raise DataError(f"{prompt.where}: column 'environment' names none ({first_line(error)})") from None
    if not isinstance(found, base):
        raise DataError(
            f"{prompt.where}: environment {kind_of(found)!r} is for students of {found.modality} models, and a "
            f"rollout of {base.modality} models plays here; take an environment of those"
        )
    return found


def start_of(prompt: Prompt, draw: int) -> Start:
    """Where a row's episodes begin; `draw` is one episode's own."""
    return Start(str(prompt.fields["task"]), int(prompt.fields["seed"]), draw)


@lru_cache
def _environment(text: str) -> Environment:
    adapter: Any = TypeAdapter(Annotated[Environment, OneOf(Environment)])
    found: Environment = adapter.validate_python(json.loads(text))
    return found


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
    return _environment(text).says_the_same()


@lru_cache
def _body(text: str) -> Body:
    found = _environment(text)
    assert isinstance(found, Control)
    return found.body()
