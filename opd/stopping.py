"""What held-out measurements say about going on: an end when they gain no more, an alarm when samples degenerate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from opd.policies.evaluation import Alarm, Evaluation, Stop
from opd.run import Run

WATCHED = {"length": "length", "entropy": "student_entropy"}
"""What an alarm may watch, and the held-out metric that it is."""


def best_of(
    history: Iterable[Mapping[str, float]], metric: str, settings: type[Evaluation]
) -> tuple[int, float] | None:
    """Step and value of the best held-out measurement of `metric` in a run's log, as `settings` say what is better; of
    equal ones the first, unless the run's last is among them. None where it was never a number."""
    key = f"held_out/{metric}"
    found = [(int(record["step"]), record[key]) for record in history if not math.isnan(record.get(key, math.nan))]
    if not found:
        return None
    best = max((value for _, value in found), key=lambda value: settings.rank(metric, value))
    return found[-1] if found[-1][1] == best else next(item for item in found if item[1] == best)


class Watch:
    """Reads every evaluation of a run, which is made under `settings`.

    Attributes:
        ended_by: why the run should end, or None.
        alarms: a line for each time that a metric left its band.
    """

    def __init__(self, settings: Evaluation):
        self.settings, self.stop, self.alarm = settings, settings.stop, settings.alarm
        self.ended_by: str | None = None
        self.alarms: list[str] = []
        self._best: float | None = None
        self._without_gain = 0
        self._outside: list[str] = []
        self._by_alarm = False
        self._step: int | None = None

    def read(self, run: Run, step: int, measured: Mapping[str, float]) -> None:
        """Take in what was measured after `step` steps; names as in `held_out/`, nothing when nothing was measured."""
        if not measured or step == self._step:
            # A run that ends at an evaluation is measured there twice.
            return
        self._step = step
        if self.stop is not None and self.stop.metric in measured:
            self._count(step, self.stop, measured[self.stop.metric])
        if self.alarm is not None:
            self._compare(run, step, self.alarm, measured)

    def _count(self, step: int, stop: Stop, value: float) -> None:
        value = self.settings.rank(stop.metric, value)
        if self._best is None or value > self._best + stop.least_gain:
            self._best, self._without_gain = value, 0
            return
        self._without_gain += 1
        if self._without_gain >= stop.patience:
            self.ended_by = (
                f"step {step}: held-out {stop.metric} has not gained in {self._without_gain} evaluations "
                f"(best {abs(self._best):.4g})"
            )

    def _compare(self, run: Run, step: int, alarm: Alarm, measured: Mapping[str, float]) -> None:
        assert run.monitor.before is not None
        start = run.monitor.before.metrics
        for key, metric in WATCHED.items():
            band, before, now = getattr(alarm, key), start.get(metric, 0.0), measured.get(metric)
            if band is None or now is None or before <= 0:
                continue
            if band[0] <= now / before <= band[1]:
                self._outside = [other for other in self._outside if other != key]
                continue
            if key in self._outside:
                continue
            self._outside.append(key)
            text = f"step {step}: held-out {metric} is {now:.3g}, {now / before:.2g} times what it was before training"
            self.alarms.append(text)
            run.monitor.warn(f"{text} (evaluation.alarm.{key} is {list(band)}); look at samples.jsonl or the report")
            if alarm.stop:
                self.ended_by, self._by_alarm = text, True

    def state_dict(self) -> dict[str, Any]:
        if self._step is None:
            return {}
        return {
            "ended_by": self.ended_by,
            "by_alarm": self._by_alarm,
            "alarms": self.alarms,
            "best": self._best,
            "without_gain": self._without_gain,
            "outside": self._outside,
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.alarms, self._best, self._by_alarm = state["alarms"], state["best"], state["by_alarm"]
        self._without_gain, self._outside, self._step = state["without_gain"], state["outside"], state["step"]
        # A run that ended goes on where its recipe no longer says that it should end.
        if self._by_alarm:
            still = self.alarm is not None and self.alarm.stop
        else:
            still = self.stop is not None and self._without_gain >= self.stop.patience
        self.ended_by, self._by_alarm = (state["ended_by"], self._by_alarm) if still else (None, False)
