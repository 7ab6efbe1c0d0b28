"""What an agent says in a turn. The processes of environments read this file alone, so it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """A tool by its name, with its arguments as plain data."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What an agent said in one turn.

    Attributes:
        text: all of it, without the tokens that end a turn.
        calls: the tools that it calls, in order.
        fault: why something in it that begins like a call is none; None where nothing is wrong.
    """

    text: str
    calls: tuple[Call, ...] = ()
    fault: str | None = None
