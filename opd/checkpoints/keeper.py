"""When a run's state is written, and which of its checkpoints are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from opd.checkpoints.store import FILES, LEFTOVER, UnusableError, facts_of, folder_of, steps_stored, write
from opd.errors import RESUME, RunError
from opd.files.ours import foreign, remove
from opd.recipe import Checkpoint
from opd.run import Run


class Checkpoints:
    """Writes what `run.state()` says; only the main process does."""

    def __init__(self, settings: Checkpoint, identity: Mapping[str, Any]):
        self.settings, self.identity = settings, identity
        self.written: int | None = None
        self._weights: dict[str, str] | None = None

    def facts(self, run: Run) -> dict[str, Any]:
        """What a later process compares itself with before it goes on from a checkpoint of this run."""
        if self._weights is None:
            # They do not move, so one look is enough.
            self._weights = {name: part.fingerprint() for name, part in run.parts("fingerprint")}
        return {**self.identity, "processes": run.accelerator.num_processes, "weights": self._weights}

    def after_step(self, run: Run) -> None:
        """Write when the recipe says so, or when this step's held-out measurement is the best so far."""
        if (self.settings.every and run.step % self.settings.every == 0) or self._is_best(run):
            self.write(run)

    def write(self, run: Run, again: bool = False) -> None:
        """Write the state between two steps, unless it is written already (`again`: also then, as something was found
        out meanwhile) or the recipe wants none.

        Raises:
            RunError: it cannot be written; what was complete before is still there.
        """
        if not self.settings.every or (run.step == self.written and not again):
            return
        state = run.state()
        facts = {"step": run.step, "held_out": run.monitor.held_out_at(run.step), **self.facts(run)}
        self.written = run.step
        if not run.accelerator.is_main_process:
            return
        folder = folder_of(run.recipe.directory, run.step)
        for leftover in folder.parent.glob(".step-*"):
            if LEFTOVER.fullmatch(leftover.name) and not foreign(leftover, FILES):
                remove(leftover, FILES)
        try:
            write(folder, facts, state)
        except OSError as error:
            done = [step for step in steps_stored(run.recipe.directory) if step < run.step]
            raise RunError(
                f"the checkpoint of step {run.step} cannot be written to {folder.parent} ({error.strerror}); "
                + (f"that of step {done[0]} is whole. " if done else "there is none yet. ")
                + f"Free some space and go on with {RESUME}"
            ) from None
        self._remove_old(run)

    def _remove_old(self, run: Run) -> None:
        # Later steps are of a history that was left, by a resume from an older checkpoint: they are not ours to remove.
        steps = [step for step in steps_stored(run.recipe.directory) if step <= run.step]
        best = self._best(run)
        for step in steps[self.settings.keep_last :]:
            if best is None or step != best[0]:
                folder = folder_of(run.recipe.directory, step)
                gone = folder.with_name(f".{folder.name}.old")
                if foreign(folder, FILES) or gone.exists():
                    # Somebody keeps something there, and so it stays.
                    continue
                # Renamed first: what a crash leaves of it must not look like a checkpoint.
                folder.rename(gone)
                with suppress(OSError):
                    remove(gone, FILES)

    def _is_best(self, run: Run) -> bool:
        value = _number(run.monitor.held_out_at(run.step), self.settings.keep_best)
        best = self._best(run)
        return value is not None and (best is None or self._rank(run, value) > self._rank(run, best[1]))

    def _best(self, run: Run) -> tuple[int, float] | None:
        """Step and value of the best held-out measurement among the stored checkpoints."""
        if self.settings.keep_best is None:
            return None
        found = []
        for step in steps_stored(run.recipe.directory):
            try:
                value = _number(facts_of(folder_of(run.recipe.directory, step))["held_out"], self.settings.keep_best)
            except UnusableError:
                continue
            if value is not None:
                found.append((step, value))
        return max(found, key=lambda item: self._rank(run, item[1]), default=None)

    def _rank(self, run: Run, value: float) -> float:
        assert self.settings.keep_best is not None
        return run.recipe.evaluation.rank(self.settings.keep_best, value)


def _number(measured: Mapping[str, float], metric: str | None) -> float | None:
    value = measured.get(metric or "")
    return None if value is None or math.isnan(value) else value
