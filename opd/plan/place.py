"""What a start would find on this machine: in the directory where the run is written, and of what it needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

from opd.assembly import load_data
from opd.checkpoints.directory import holds_run, must_clear, refuse_links, refuse_occupied, refuse_place
from opd.checkpoints.resume import identity, newest
from opd.errors import OVERWRITE, RESUME, DataError, OpdError, RunError
from opd.files.whole import check_lockable
from opd.hub import check_push
from opd.recipe import Recipe
from opd.trackers import check_trackers


def found_at(recipe: Recipe) -> list[str]:
    """For people: how a start would go on with the run that lies in the recipe's directory; nothing where there is
    none. Nothing is written.

    Raises:
        OpdError: what a start would refuse whatever it is told: a place that can be no run's directory, that cannot be
            written, that another process writes to, or that holds something else. With `resume: auto` also a run that
            it could not go on with.
    """
    directory = recipe.directory
    refuse_place(recipe)
    refuse_links(directory)
    check_lockable(directory)
    if not holds_run(directory):
        refuse_occupied(directory)
        return []
    by_itself = recipe.resume == "auto"
    asked = "resume: auto" if by_itself else RESUME
    try:
        way = _going_on(recipe)
    except RunError as error:
        if by_itself:
            raise
        way = f"is refused: {error}"
    other = "" if by_itself else f"; {OVERWRITE} begins anew, and without either a start is refused"
    return [f"{directory} holds a run already: {asked} {way}{other}"]


def lacking(recipe: Recipe) -> list[str]:
    """For people: what a run needs of a machine and this one has not. Another may have it, so a plan is made all the
    same."""
    checks: list[Callable[[], None]] = [partial(check_trackers, recipe.tracking.trackers)]
    if recipe.push_to is not None:
        checks.append(partial(check_push, recipe.push_to))
    if recipe.verifier is not None:
        checks.append(recipe.verifier.check_machine)
    found = []
    for check in checks:
        try:
            check()
        except OpdError as error:
            found.append(f"a run here is refused: {error}")
    return found


def _going_on(recipe: Recipe) -> str:
    """How a run that lies in the recipe's directory goes on; raises `RunError` where it cannot."""
    if any(source.remote is not None for source in (*recipe.prompts, *(recipe.evaluation.prompts or ()))):
        return "goes on with it if neither the recipe nor its prompts have changed since; the prompts are not read here"
    bad: list[DataError] = []
    passed_over: list[str] = []
    found = newest(recipe, identity(recipe, itertools.chain(*load_data(recipe, bad))), False, passed_over.append)
    told = "".join(f" ({line})" for line in passed_over)
    if found is not None:
        step = found[1]["step"]
        return f"goes on from step {step} of {recipe.steps}{', its last' if step == recipe.steps else ''}{told}"
    must_clear(recipe, overwrite=False, unfinished=True)
    return "begins it again, since it was stopped before its first checkpoint"
