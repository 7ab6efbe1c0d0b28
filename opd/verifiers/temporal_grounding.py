"""When something happens in a video: an interval in seconds, read from the answer and compared with the true one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator

from opd.context import Context
from opd.errors import DataError
from opd.prompts import Prompt
from opd.trajectories import Outcome, Trajectories
from opd.verifiers.base import OneByOne, Verifier

NUMBER = r"(?<![\d.])\d+(?:\.\d+)?"
CLOCK = re.compile(r"(?<![\d:.])(?:(\d{1,2}):)?(\d{1,2}):(\d{2}(?:\.\d+)?)(?![\d:])")
UNIT = r"(?:\s*(?:s|sec|secs|seconds?)\b\.?)?"
DASHED = re.compile(rf"({NUMBER}){UNIT}\s*[-\u2013\u2014]\s*({NUMBER})")
WORDED = re.compile(rf"({NUMBER}){UNIT}\s+to\s+({NUMBER})")
PLAIN = re.compile(rf"{NUMBER}(?![\d:])")


class Interval(NamedTuple):
    """From `start` to `end`, in seconds."""

    start: float
    end: float

    def iou(self, other: Interval) -> float:
        """Length of what both cover over the length from the first start to the last end; 0 of an interval that has no
        length."""
        if self.start >= self.end or other.start >= other.end:
            return 0.0
        covered = min(self.end, other.end) - max(self.start, other.start)
        return max(0.0, covered) / (max(self.end, other.end) - min(self.start, other.start))


def interval_in(text: str) -> Interval | None:
    """The first pair of times in an answer, in the order in which they stand; None where there is no pair.

    Times like `1:02:03.5` or `2:03` count before `a - b`, this before `a to b`, and all before two numbers anywhere;
    numbers are seconds, with or without their unit (the order of the parser of TimeLens, which the paper measures by).
    """
    text = text.lower()
    clocks = [_seconds(*found.groups()) for found in CLOCK.finditer(text)]
    if len(clocks) >= 2:
        return Interval(*clocks[:2])
    for pattern in (DASHED, WORDED):
        if (found := pattern.search(text)) is not None:
            return Interval(float(found[1]), float(found[2]))
    numbers = [float(found[0]) for found in PLAIN.finditer(text)]
    return Interval(*numbers[:2]) if len(numbers) >= 2 else None


def _seconds(hours: str | None, minutes: str, seconds: str) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds)


class TemporalGrounding(Verifier):
    """Intersection over union of the interval in the answer and the row's, both in seconds; no interval, or one that
    ends before it begins, has 0.

    Held-out measurements have its mean as `accuracy` (mIoU), `recall_at_M` for each M of `recalls`, the share of
    answers with an IoU of at least M, and `parsed`, the share of answers with an interval.
    """

    kind: Literal["temporal_grounding"] = "temporal_grounding"
    modality: ClassVar[str | None] = "language"
    interval: str = Field("interval", description="Column with the true [start, end] in seconds")
    reward: Literal["iou", "timestamp_aware"] = Field(
        "iou",
        description="IoU, or IoU times (1 - |start - true start| / duration) times the same of the ends (Time-R1), a "
        "reward to train with",
    )
    duration: str = Field("duration", description="Column with the video's seconds, which timestamp_aware reads")
    recalls: tuple[float, ...] = Field((0.3, 0.5, 0.7), description="Values of IoU whose recall is measured")

    @field_validator("recalls")
    @classmethod
    def _are_ious(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < level <= 1 for level in value) or len(set(value)) != len(value):
            raise ValueError("each is above 0 and at most 1, and stands once")
        return value

    @property
    def measured(self) -> tuple[str, ...]:
        return (*(f"recall_at_{level:g}" for level in self.recalls), "parsed")

    def judges(self, prompt: Prompt) -> bool:
        return prompt.fields.get(self.interval) is not None

    @property
    def needs(self) -> str:
        return f"the column {self.interval!r}"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in filter(self.judges, prompts):
            self.true_interval(prompt)
            if self.reward == "timestamp_aware":
                self.length(prompt)

    def true_interval(self, prompt: Prompt) -> Interval:
        """Raises:
        DataError: the row's is none.
        """
        value = prompt.fields[self.interval]
        numbers = [float(x) for x in value] if _are_numbers(value) else []
        if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or not 0 <= numbers[0] < numbers[1]:
            raise DataError(
                f"{prompt.where or prompt.id}: column {self.interval!r} holds {value!r}; an interval is [start, end] "
                "in seconds, the start from 0 on and before the end"
            )
        return Interval(*numbers)

    def length(self, prompt: Prompt) -> float:
        """Seconds of the row's video, as its column says.

        Raises:
            DataError: it says none.
        """
        value = prompt.fields.get(self.duration)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise DataError(
                f"{prompt.where or prompt.id}: column {self.duration!r} holds {value!r}; reward timestamp_aware needs "
                "the video's seconds there (verifier.duration names the column)"
            )
        return float(value)

    def build(self, context: Context) -> Grounded:
        return Grounded(self)


class Grounded(OneByOne):
    """A built verifier. It remembers what the last batch's answers came to, for the log."""

    settings: TemporalGrounding

    def __init__(self, settings: TemporalGrounding):
        super().__init__(settings)
        self.last: dict[str, torch.Tensor] = {}

    def score(self, trajectories: Trajectories, outcomes: Sequence[Outcome]) -> torch.Tensor:
        self.last = self.measure(trajectories, outcomes)
        return super().score(trajectories, outcomes)

    def verdict(self, prompt: Prompt, completion: object) -> float | None:
        if not self.judges(prompt):
            return None
        said, true = interval_in(str(completion)), self.settings.true_interval(prompt)
        if said is None:
            return 0.0
        found = said.iou(true)
        if found and self.settings.reward == "timestamp_aware":
            length = self.settings.length(prompt)
            for mine, wanted in zip(said, true, strict=True):
                # A time beyond the video may be further off than the video is long.
                found *= max(0.0, 1 - abs(mine - wanted) / length)
        return found

    def measure(self, trajectories: Trajectories, outcomes: Sequence[Outcome]) -> dict[str, torch.Tensor]:
        rows = []
        for prompt, answer in zip(trajectories.prompts, outcomes, strict=True):
            if not self.judges(prompt):
                rows.append([math.nan] * len(self.settings.measured))
                continue
            said = interval_in(str(answer))
            iou = 0.0 if said is None else said.iou(self.settings.true_interval(prompt))
            # An IoU is a quotient of times that decimals cannot all write: what is a level on paper reaches it.
            rows.append([*(float(iou >= level - 1e-9) for level in self.settings.recalls), float(said is not None)])
        columns = torch.tensor(rows, dtype=torch.float32).view(len(rows), -1).unbind(1) if rows else ()
        return dict(zip(self.settings.measured, columns, strict=False))

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        sums = torch.zeros(len(self.settings.measured), 2, dtype=torch.float64)
        for i, values in enumerate(self.last.values()):
            known = values[~values.isnan()].double()
            sums[i] = torch.tensor([known.sum(), len(known)], dtype=torch.float64)
        totals = sum_over_processes(sums).tolist()
        pairs = zip(self.settings.measured, totals, strict=True)
        return {name: total / count for name, (total, count) in pairs if count}

    def shown(self, prompt: Prompt, row: Mapping[str, Any]) -> dict[str, Any]:
        if not self.judges(prompt):
            return {}
        found: dict[str, Any] = {"true": list(self.settings.true_interval(prompt))}
        for name, key in (("said", "completion"), ("teacher", "teacher_answer")):
            if key in row:
                said = interval_in(str(row[key]))
                found[name] = None if said is None else list(said)
        length = prompt.fields.get(self.settings.duration)
        if isinstance(length, int | float) and not isinstance(length, bool):
            found["duration"] = float(length)
        return {"interval": found}


def _are_numbers(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
