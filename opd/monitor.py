"""What a person sees of a run: the progress bar, metrics.jsonl, trackers, held-out samples; and the wish to stop."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from opd.callbacks import Callbacks
from opd.choice import nested
from opd.errors import RESUME, RecipeError, RunError
from opd.evaluation import evaluate
from opd.failures import skipped_rows
from opd.files.run_directory import lines
from opd.files.whole import flush, main_process
from opd.measurement import Example, Measurement
from opd.policies.base import Student
from opd.policies.held_out import HeldOut, as_logged
from opd.progress import Bar, Lines, Nothing, shows_bars
from opd.provenance import models_of, student_of
from opd.recipe import Recipe
from opd.run import Run
from opd.shaping import words_of

LOGS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "curriculum.jsonl")
"""What a run adds lines to."""


class Monitor:
    """Writes to a run directory and to the console of the main process."""

    def __init__(
        self, directory: Path, console: Console | None = None, quiet: bool = False, callbacks: Callbacks | None = None
    ):
        self.directory = directory
        self.callbacks = callbacks or Callbacks()
        self.ended_by: str | None = None
        """Which callback asked for the end, as a person reads it."""
        self.failed: RunError | None = None
        """What a callback failed with, until the step is whole."""
        self.console = console or Console(stderr=True, quiet=quiet)
        self.stop_requested = False
        self.stopped_by: int | None = None
        self.before: HeldOut | None = None
        self.after: HeldOut | None = None
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self._progress: Bar | Lines | Nothing = Nothing()
        self._started = 0.0
        self._warned: set[str] = set()

    def begin(self, run: Run) -> dict[str, float]:
        """Measure the student before training, unless an earlier process of this run did, and show how far it is.

        Returns what was measured, under `held_out/`.
        """
        self._started = time.perf_counter() - self.seconds
        measured: dict[str, float] = {}
        if self.before is None:
            with self.status("measuring the student before training"):
                self.before = self._evaluate(run)
            measured = _held_out(self.before.metrics)
            self._check_measured(run, self.before.metrics)
            self.raise_failed(run)
        if run.accelerator.is_main_process and not self.console.quiet:
            made = Bar if shows_bars(self.console) else Lines
            self._progress = made(self.console, run.step, run.recipe.steps)
        return measured

    def _check_measured(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Raise `RecipeError` for a setting that waits for a metric which this run does not measure."""
        stop = run.recipe.evaluation.stop
        wanted = {
            "checkpoint.keep_best": run.recipe.checkpoint.keep_best,
            "evaluation.stop.metric": None if stop is None else stop.metric,
        }
        for key, name in wanted.items():
            if name is not None and name not in metrics:
                raise RecipeError(
                    f"{key} is {name!r}, which is not measured on this run's held-out prompts; they give "
                    f"{', '.join(metrics)}"
                )

    def after_step(self, run: Run, signals: dict[str, float], measurement: Measurement) -> dict[str, float]:
        """Log one step's signals and one of its trajectories, or all of them where the update was skipped; evaluate
        when the recipe or the curriculum says so.

        Returns the metrics of that evaluation, if any, as signals under `held_out/`.
        """
        self.log(run, "train", signals)
        skipped = "skipped" in signals
        shown = [Example(*part, []) for part in measurement.parts] if skipped else measurement.example
        for example in shown if run.optimiser.writes_rollouts else ():
            trajectories, values = example.trajectories, example.values
            rows = as_logged(run.student.rows(trajectories, values), trajectories.prompts, run)
            told = words_of(run.recipe.shaping, trajectories, values)
            rows = [row | ({"shaped": words} if words else {}) for row, words in zip(rows, told, strict=True)]
            rows = with_alternatives(rows, example, run.student)
            rows = run.student.joined(rows, trajectories.prompts)
            note = {"problem": "loss or gradient was not finite: the update was skipped"} if skipped else {}
            self._append(run, "rollouts.jsonl", [row | note for row in rows])
        called = run.recipe.objective[0].called
        first = {called: signals["divergence"]} if "divergence" in signals else {}
        # Of several objectives each has its own value: that of the first may be 0 where the others learn.
        each = {k.removeprefix("objective/"): v for k, v in signals.items() if k.startswith("objective/")}
        numbers = "".join(f"{name} {value:.3f}  " for name, value in (each or first).items())
        numbers += f"length {signals['length']:.0f}"
        if "reward" in signals:
            numbers += f"  reward {signals['reward']:.2f}"
        for name in dict.fromkeys(name for part in nested(run.recipe) for name in part.shown):
            if name in signals:
                numbers += f"  {name.removeprefix('curriculum/').replace('/', ' ')} {_short(signals[name])}"
        numbers += f"  {signals['tokens_per_second']:.0f} {run.student.unit}/s"
        self._progress.update(run.step, numbers)
        every = run.recipe.evaluation.every
        due = every and run.step % every == 0 and run.step < run.recipe.steps
        if not due and not run.course.asks_evaluation(run.step):
            return {}
        metrics = self._evaluate(run).metrics
        self.console.print(f"step {run.step}: {_line(metrics)}", soft_wrap=True)
        return _held_out(metrics)

    def end(self, run: Run) -> dict[str, float]:
        """Measure the student after training (also when it was stopped early), and return the metrics."""
        self._progress.stop()
        with self.status("measuring the student after training"):
            self.after = self._evaluate(run)
        self.raise_failed(run)
        self.seconds = time.perf_counter() - self._started
        return self.after.metrics

    def log(self, run: Run, prefix: str, values: dict[str, float], more: Mapping[str, float] | None = None) -> None:
        """Add a line to metrics.jsonl, and tell trackers: `values` under `prefix`, and `more` under its own names."""
        record = {"step": run.step, **{f"{prefix}/{name}": value for name, value in values.items()}, **(more or {})}
        self.history.append(record)
        with self._writing("metrics.jsonl"):
            if run.accelerator.is_main_process:
                with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            run.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=run.step)
        asked = self._tell(run, "on_log", {k: v for k, v in record.items() if k != "step"})
        if asked is not None:
            self.stop_requested, self.ended_by = True, f"the callback {asked} asked for it after step {run.step}"

    def _tell(self, run: Run, event: str, told: object) -> str | None:
        if self.failed is not None or not run.accelerator.is_main_process:
            return None
        try:
            return self.callbacks.tell(event, run.step, told)
        except RunError as error:
            self.failed = error
            return None

    def raise_failed(self, run: Run) -> None:
        """Between two steps, raise what a callback failed with meanwhile; the state is written before.

        Raises:
            RunError: of `Callbacks.tell`.
        """
        if self.failed is None:
            return
        # Of several processes the others would have to take part in writing it.
        if run.step and run.accelerator.num_processes == 1:
            run.checkpoints.write(run)
        raise self.failed

    def held_out_at(self, step: int) -> dict[str, float]:
        """The held-out metrics that were measured last, if that was at `step`."""
        record = self.history[-1] if self.history else {"step": -1}
        found = {k.removeprefix("held_out/"): v for k, v in record.items() if k.startswith("held_out/")}
        return found if record["step"] == step else {}

    def state_dict(self) -> dict[str, Any]:
        """What was measured before training, and how much of each log belongs to the steps done."""
        assert self.before is not None
        sizes = {}
        for name in LOGS if main_process() else ():
            path = self.directory / name
            path.touch()
            flush(path)
            sizes[name] = path.stat().st_size
        left_out = {"left_out": sorted(self.before.left_out)} if self.before.left_out else {}
        seconds = time.perf_counter() - self._started
        return {"before": self.before.metrics, **left_out, "seconds": seconds, "bytes": sizes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the logs where they were: what lies beyond is of steps that will be done again, and goes."""
        self.seconds = state["seconds"]
        rows: list[dict[str, Any]] = []
        for name, size in state["bytes"].items() if main_process() else ():
            path = self.directory / name
            with self._writing(name), path.open("ab") as file:
                if file.tell() < size:
                    self.warn(f"{path} is shorter than when the checkpoint was written: some of its steps are lost")
                file.truncate(min(size, file.tell()))
            records = (line.record for line in lines(path) if line.record)
            if name == "metrics.jsonl":
                self.history = list(records)
            if name == "samples.jsonl":
                rows = list(itertools.takewhile(lambda row: row["step"] == 0, records))
        self.before = HeldOut(state["before"], rows, {}, left_out=frozenset(state.get("left_out", ())))

    def opening(self, recipe: Recipe) -> None:
        """What a log file is of, in one line; a terminal shows it as it goes."""
        if main_process() and not shows_bars(self.console):
            block = recipe.dump()
            teachers = ", ".join(models_of(t) for t in block["teacher"]) or "none"
            self._say(
                f"run {recipe.name}: student {student_of(block['student'])}, teacher {teachers}, {recipe.steps} steps "
                f"of {recipe.batch.prompts * recipe.batch.group} trajectories, in {recipe.directory}"
            )

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """What takes a while: shown as long as it lasts, or as a line of a log file."""
        if shows_bars(self.console):
            with self.console.status(escape(text)):
                yield
            return
        if main_process():
            self._say(text)
        yield

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that a person must see, also of a quiet run."""
        if self.console.quiet:
            print(f"opd: {text}", file=sys.stderr)
        else:
            self._say(f"opd: {text}")

    def warn_once(self, text: str) -> None:
        """The same, the first time alone."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    def warn_of_skipped(self, bad: Sequence[Exception]) -> None:
        """Say which rows were left out; the first few by name."""
        for text in skipped_rows(bad):
            self.warn(text)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write to {self.directory / name} ({error.strerror or error}); mend that and go on with "
                f"{RESUME}: the checkpoints are whole"
            ) from None

    def _evaluate(self, run: Run) -> HeldOut:
        result = evaluate(run)
        self.log(run, "held_out", result.metrics, {f"report/{name}": value for name, value in result.asked.items()})
        self._append(run, "samples.jsonl", result.rows)
        self._tell(run, "on_samples", result.rows)
        return result

    def record(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add what a curriculum says of its prompts to curriculum.jsonl."""
        self._append(run, "curriculum.jsonl", [dict(row) for row in rows])

    def _append(self, run: Run, name: str, rows: list[dict[str, Any]]) -> None:
        if run.accelerator.is_main_process:
            with self._writing(name), (self.directory / name).open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({"step": run.step, **row}, ensure_ascii=False) + "\n")

    def give_up(self) -> None:
        """Raise where somebody asked for an end while there is no step yet that could be finished."""
        if self.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stopped_by is not None:
            raise RunError(f"stopped by signal {self.stopped_by} before the first step; nothing was trained")

    @contextmanager
    def signals_handled(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask the loop to finish its step and save; a second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested, self.stopped_by = True, number
            self.console.print(
                "stopping after this step; the student will be saved (interrupt again to quit at once)", soft_wrap=True
            )

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._progress.stop()


def with_alternatives(rows: list[dict[str, Any]], example: Example, student: Student) -> list[dict[str, Any]]:
    """Rows of a step's example with what it looked at: for each token the likeliest of each side as `[text,
    probability]`, none where it did not look. Unchanged where it looked nowhere."""
    sides = {side for looked in example.looked if looked is not None for side in looked.tops}
    for row, looked in zip(rows, example.looked, strict=True) if sides else ():
        lists: dict[str, list[list[tuple[str, float]]]] = {side: [[] for _ in row["tokens"]] for side in sorted(sides)}
        places, tops = ([], {}) if looked is None else (looked.places.tolist(), looked.tops)
        for side, (ids, probabilities) in tops.items():
            named = student.named(ids.flatten())
            if named is None:
                return rows
            texts = iter(named)
            for place, numbers in zip(places, probabilities.tolist(), strict=True):
                lists[side][place] = [(next(texts), round(each, 4)) for each in numbers]
        row["alternatives"] = lists
    return rows


def _short(value: float) -> str:
    # What rounds to 0 has no sign.
    return f"{value:.0f}" if value.is_integer() else f"{round(value, 2) + 0.0:.2f}"


def _held_out(metrics: dict[str, float]) -> dict[str, float]:
    return {f"held_out/{name}": value for name, value in metrics.items()}


def _line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
