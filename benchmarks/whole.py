"""A run of a benchmark, which is one that came to its end: a part of one is no measurement."""

from __future__ import annotations

import signal

from opd.api import Result, execute
from opd.errors import RunError
from opd.recipe import Recipe


def execute_whole(recipe: Recipe, *, overwrite: bool = False) -> Result:
    """`opd.execute`, quietly.

    Raises:
        RunError: a signal stopped it, and whoever sent that wants the benchmark to end.
    """
    result = execute(recipe, quiet=True, overwrite=overwrite)
    if result.stopped_by is not None:
        raise RunError(f"{recipe.directory}: stopped by {signal.Signals(result.stopped_by).name}; delete it and go on")
    return result
