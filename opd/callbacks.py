"""Callbacks: code of yours that is told what a run measures, from Python (`opd.distill(callbacks=[...])`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from opd.errors import RecipeError, RunError
from opd.recipe import Recipe


class Callback:
    """Base of callbacks; every method does nothing, so override those that you want.

    They are called in the main process alone, in the loop: what takes long is waited for. An error ends the run as a
    `RunError` when the step is done; its checkpoint is written before (of several processes the newest stays what it
    was), and from there it goes on.
    """

    def on_start(self, recipe: Recipe) -> None:
        """Everything is built and checked, and nothing measured yet; a run that goes on begins here again. The run
        writes to `recipe.directory`."""

    def on_log(self, step: int, values: Mapping[str, float]) -> bool | None:
        """What a line of metrics.jsonl gets: `train/NAME` after each step, `held_out/NAME` after each evaluation.

        Args:
            step: steps done; 0 before training.
            values: numbers by name.

        Returns:
            True to end the run after this step: its student is measured and saved.
        """
        return None

    def on_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows that an evaluation adds to samples.jsonl: held-out prompts, answers, tokens and their values."""

    def on_end(self, directory: Path, summary: Mapping[str, Any]) -> None:
        """The student is saved in `directory / "student"`; `summary` is what summary.json holds."""


class Callbacks:
    """All callbacks of a run, and the live trackers among them.

    Raises:
        RecipeError: something that is neither, or one that is in no list.
    """

    def __init__(self, given: Iterable[Callback | GeneralTracker] = ()):
        if not isinstance(given, Iterable):
            raise RecipeError(
                f"callbacks is {_named(given)}; give a list of objects of opd.Callback, or of accelerate's "
                "GeneralTracker: callbacks=[...]"
            )
        given = list(given)
        for i, each in enumerate(given):
            if not isinstance(each, Callback | GeneralTracker):
                raise RecipeError(
                    f"callbacks[{i}] is {_named(each)}; give objects of opd.Callback, or of accelerate's GeneralTracker"
                )
        self.trackers = [each for each in given if isinstance(each, GeneralTracker)]
        """Handed to `accelerate` beside those that the recipe names."""
        self.callbacks = [each for each in given if isinstance(each, Callback)]

    def tell(self, event: str, *told: object) -> str | None:
        """Call a method of each; the name of one that asks for the end."""
        ended_by = None
        for each in self.callbacks:
            name = f"{type(each).__name__}.{event}"
            try:
                wish = getattr(each, event)(*told)
            except Exception as error:
                # Whatever somebody's callback raises.
                raise RunError(f"the callback {name} failed ({type(error).__name__}: {error})") from error
            if event == "on_log" and wish is True:
                ended_by = name
        return ended_by


def _named(given: object) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else repr(given)[:60]
