"""What a recipe says of held-out measurements, and of what they are a reason for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from opd.choice import OneOf, Settings, as_list
from opd.errors import nearest
from opd.prompts import Prompts

Better = Literal["larger", "smaller"]
"""Which of two values of a metric is the better one."""


class Stop(Settings):
    """When a run ends before its last step because it gains no more."""

    metric: str = Field(
        "reverse_kl",
        description="Held-out metric that has to gain: one of those that the kind of student is measured by",
    )
    patience: int = Field(3, ge=1, description="Evaluations in a row without a gain before the run ends")
    least_gain: float = Field(0.0, ge=0, description="By how much the best value has to be beaten")


class Alarm(Settings):
    """Bands for held-out samples, as multiples of what they were before training. Outside of one a line warns: a
    student that teaches itself, or follows reverse KL for long, may collapse to short or endless and repetitive texts
    while its divergence still falls."""

    length: tuple[float, float] | None = Field((0.33, 3.0), description="Of the mean length; null does not watch it")
    entropy: tuple[float, float] | None = Field(
        (0.33, 3.0), description="Of the student's mean entropy; null does not watch it"
    )
    stop: bool = Field(False, description="End the run at an alarm, instead of only warning")

    @field_validator("length", "entropy")
    @classmethod
    def _is_a_band(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < 1 < value[1]:
            raise ValueError("a band is [low, high] around 1, what was measured before training, e.g. [0.5, 2]")
        return value


class Evaluation(Settings):
    """Base of what is measured on held-out prompts before and after training, and every `every` steps between: what
    every kind of student knows. Each policy names its own (`Policy.evaluation`)."""

    measures: ClassVar[Mapping[str, Better]] = {"reverse_kl": "smaller", "accuracy": "larger", "pass_at_k": "larger"}
    """Metrics by which a run may be ended and its best step be told, and which of two values of each is better."""

    every: int = Field(0, ge=0, description="Steps between evaluations; 0 = before and after only")
    k: int = Field(1, ge=1, le=10_000, description="Completions sampled of each held-out prompt, for Avg@k and Pass@k")
    held_out: int = Field(32, ge=1, description="Prompts held out of the prompt set")
    prompts: Annotated[list[Annotated[Prompts, OneOf(Prompts, "file")]], BeforeValidator(as_list)] = Field(
        default=[], description="A held-out set of its own, instead of a share of the prompt set"
    )
    samples: int = Field(3, ge=0, description="Completions shown side by side, before and after")
    stop: Stop | None = Field(None, description="End the run when a held-out metric gains no more")
    alarm: Alarm | None = Field(Alarm(), description="Warn when held-out samples degenerate; null never warns")

    @field_validator("held_out", mode="before")
    @classmethod
    def _some(cls, value: object) -> object:
        if value == 0 and not isinstance(value, bool):
            raise ValueError(
                "a run is measured before and after training, on prompts that it is not trained on; hold out 1 or "
                "more, or name a set of their own in evaluation.prompts and leave the key out"
            )
        return value

    @property
    def longest(self) -> int | None:
        """Most actions of a held-out rollout, where it is not the training rollout's."""
        return None

    def alike(self, rollout: bool) -> bool:
        """Whether all held-out completions of a prompt are one; `rollout`: whether those of training are."""
        return False

    @classmethod
    def rank(cls, metric: str, value: float) -> float:
        """The larger the better: the value of one of `measures`, or of those of which less is better its negative."""
        return value if cls.measures[metric] == "larger" else -value

    @classmethod
    def check_measure(cls, metric: str) -> None:
        """Raise `ValueError` for a metric of which nobody says what is better."""
        if metric not in cls.measures:
            raise ValueError(
                f"{metric!r} is no metric that says whether more or less of it is better; of students of this kind "
                f"these do: {', '.join(cls.measures)}{nearest(metric, cls.measures)}"
            )

    @field_validator("stop")
    @classmethod
    def _stops_by_a_measure(cls, value: Stop | None) -> Stop | None:
        if value is not None:
            cls.check_measure(value.metric)
        return value

    @model_validator(mode="after")
    def _stops_on_evaluations(self) -> Evaluation:
        key = "stop" if self.stop is not None else "alarm.stop" if self.alarm is not None and self.alarm.stop else ""
        if key and not self.every:
            raise ValueError(f"{key} ends a run by its evaluations, and evaluation.every is 0; set evaluation.every")
        return self
