"""One family of exceptions. Each message names what was wrong, what is accepted and the fix, in one or two lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

RESUME, OVERWRITE, FORCE_CHANGED = (
    f"--{name.replace('_', '-')} (Python: {name}=True)" for name in ("resume", "overwrite", "force_changed")
)
"""How messages name what both the command line and Python functions take."""


class OpdError(Exception):
    """Base of every error that a user can cause or mend. The command line prints it and exits with `exit_code`."""

    exit_code = 2


class RecipeError(OpdError):
    """A recipe, or an override of one, that cannot be run."""


class DataError(OpdError):
    """A prompt set that cannot be read or does not hold what the recipe asks for."""


class ModelError(OpdError):
    """A model or tokenizer that cannot be loaded, or a pair of them that does not fit together."""


class IncompatibleError(OpdError):
    """Two choices of a recipe that make no sense together."""


class SelfTestError(OpdError):
    """The start-up self-test found that this set-up would train on a wrong signal."""


class RunError(OpdError):
    """A run directory or a running job in a state that the run cannot go on from."""


def first_line(error: BaseException, about: str = "") -> str:
    """What another library's error says, in one short line: the first that holds `about`, or else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if about in line), *lines[:1] or [type(error).__name__])
    return f"no {found}"[:180] if isinstance(error, KeyError) else found[:180]


def nearest(word: str, accepted: Iterable[str]) -> str:
    """`' (did you mean x?)'` for the closest accepted word, or an empty string when none is close."""
    found = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
