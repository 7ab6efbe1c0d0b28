"""One family of exceptions. Each message names what was wrong, what is accepted and the fix, in one or two lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def nearest(word: str, accepted: Iterable[str]) -> str:
    """`' (did you mean x?)'` for the closest accepted word, or an empty string when none is close."""
    found = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
