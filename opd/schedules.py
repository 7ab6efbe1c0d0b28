"""Schedules are data: a scalar of a recipe may be a constant, points over steps, or a named schedule.

```yaml
learning_rate: 1e-4                                    # constant
learning_rate: [[0, 0], [20, 1e-4], [200, 1e-5]]       # straight lines between (step, value) points, then constant
learning_rate: {kind: cosine, start: 1e-4, warmup: 20} # named
```

A scheduled value is a number too (its value at step 0), so that whatever reads a recipe without a step sees a number.
`Settings.at` puts the numbers of a step in the schedules' places.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

Point = tuple[Annotated[int, Field(ge=0)], float]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Named(_Shape):
    """From `start` to `end` over `steps` steps (default: to the end of the run), after a warm-up from near zero.

    The k-th of `warmup` steps takes k / (warmup + 1) of `start`, so the first step counts already.
    """

    kind: Literal["linear", "cosine", "constant"]
    start: float = Field(description="Value after warming up")
    end: float = Field(0.0, description="Value at the end")
    warmup: int = Field(0, ge=0, description="Steps of a linear rise from 0")
    steps: int | None = Field(None, ge=1, description="Where the end is reached; default the run's steps")

    def at(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return self.start * (step + 1) / (self.warmup + 1)
        last = self.steps or steps
        progress = min(1.0, (step - self.warmup) / max(1, last - self.warmup))
        if self.kind == "constant":
            return self.start
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2

    def extremes(self) -> tuple[float, float]:
        ends = [self.start] if self.kind == "constant" else [self.start, self.end]
        return min(ends), max(ends)


class Points(_Shape):
    """`[step, value]` pairs in order; straight lines between them (`hold`: each value until the next step)."""

    kind: Literal["points", "hold"] = "points"
    points: list[Point] = Field(min_length=1, description="[step, value] pairs, steps growing")

    def at(self, step: int, steps: int) -> float:
        before = [p for p in self.points if p[0] <= step]
        after = [p for p in self.points if p[0] > step]
        if not before:
            return after[0][1]
        if not after or self.kind == "hold":
            return before[-1][1]
        (x0, y0), (x1, y1) = before[-1], after[0]
        return y0 + (y1 - y0) * (step - x0) / (x1 - x0)

    def extremes(self) -> tuple[float, float]:
        values = [value for _, value in self.points]
        return min(values), max(values)


_SHAPES: TypeAdapter[Named | Points] = TypeAdapter(Annotated[Named | Points, Field(discriminator="kind")])


class Scheduled:
    """What a field holds when a recipe gives it a schedule."""

    shape: Named | Points

    @abstractmethod
    def at(self, step: int, steps: int) -> float | int:
        """The number at `step` (from 0) of a run of `steps` steps."""

    @property
    def counts_on_steps(self) -> bool:
        """Whether the number at a step depends on how many steps the run has."""
        return isinstance(self.shape, Named) and self.shape.kind != "constant" and self.shape.steps is None

    def plain(self) -> list[list[float]] | dict[str, Any]:
        """The schedule as a recipe writes it."""
        if isinstance(self.shape, Points) and self.shape.kind == "points":
            return [list(point) for point in self.shape.points]
        return {"kind": self.shape.kind, **self.shape.model_dump(exclude_defaults=True)}


class ScheduledFloat(Scheduled, float):
    """A float over steps."""

    @classmethod
    def of(cls, shape: Named | Points) -> Self:
        self = cls(shape.at(0, shape.steps or 1 if isinstance(shape, Named) else 1))
        self.shape = shape
        return self

    def at(self, step: int, steps: int) -> float:
        return self.shape.at(step, steps)


class ScheduledInt(Scheduled, int):
    """An integer over steps: the nearest one."""

    @classmethod
    def of(cls, shape: Named | Points) -> Self:
        self = cls(round(shape.at(0, shape.steps or 1 if isinstance(shape, Named) else 1)))
        self.shape = shape
        return self

    def at(self, step: int, steps: int) -> int:
        return round(self.shape.at(step, steps))


def extremes(value: float) -> tuple[float, float]:
    """The least and the largest of a number over all steps, whether it follows a schedule or not."""
    return value.shape.extremes() if isinstance(value, Scheduled) else (value, value)


def _holds_a_switch(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_a_switch(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_a_switch(item) for item in value)
    return isinstance(value, bool)


class OverSteps:
    """Annotation that lets a number's field take a schedule; its bounds hold for every step.

    `Annotated[float, OverSteps(gt=0)]`. Bounds given by `Field` would turn the schedule into a number.
    """

    def __init__(self, **bounds: float):
        self.bounds = bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        self.kind: type[ScheduledFloat] | type[ScheduledInt] = ScheduledInt if source is int else ScheduledFloat
        number: Any = {**handler(source), **self.bounds}
        return core_schema.no_info_wrap_validator_function(self._validate, number)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        number = "integer" if self.kind is ScheduledInt else "number"
        return {"anyOf": [{"type": number}, {"type": "array"}, {"type": "object"}]}

    def _validate(self, value: Any, number: Any) -> Any:
        if isinstance(value, Scheduled):
            return value
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = {"kind": "points", "points": value}
        if not isinstance(value, dict):
            return number(value)
        if _holds_a_switch(value):
            raise ValueError("true is no number")
        try:
            shape = _SHAPES.validate_python(value)
        except ValueError:
            raise ValueError(
                "a schedule is a list of [step, value] pairs, {kind: hold, points: [...]}, or {kind: linear|cosine|"
                "constant, start: ..., end: ..., warmup: ..., steps: ...}"
            ) from None
        steps = [step for step, _ in shape.points] if isinstance(shape, Points) else []
        if steps != sorted(set(steps)):
            raise ValueError("the steps of a schedule's points must grow")
        for extreme in shape.extremes():
            number(round(extreme) if self.kind is ScheduledInt else extreme)
        return self.kind.of(shape)
