"""A length of rollouts that follows how far the teacher still helps (Prune-OPD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from opd.context import Context
from opd.curricula.base import Asker, Course, Curriculum, Draw, Gather
from opd.curricula.shuffled import ShuffledCourse
from opd.prompts import Prompt
from opd.reduction import sums_by_trajectory
from opd.trajectories import Trajectories


class Window(Curriculum):
    """All rollouts of a step have one budget, the window, which follows how far the teacher still helps. It stands in
    the place of `rollout.max_new_tokens`. Where the share of rollouts whose effective length (`reliable` positions,
    which the shaping measures) comes within `margin` of it reaches `hits`, the window grows by `by`; after `patience`
    steps in a row without that it shrinks by as much. Held-out samples keep their own length.

    A rollout that ends by itself before that is no hit, however well student and teacher go together: short answers
    make short windows.
    """

    kind: Literal["window"] = "window"
    modality: ClassVar[str | None] = "language"
    reads: ClassVar[tuple[str, ...]] = ("reliable",)
    shown: ClassVar[tuple[str, ...]] = ("curriculum/window",)
    minimum: int = Field(ge=1, description="Least budget")
    maximum: int = Field(ge=1, description="Largest budget")
    start: int | None = Field(None, ge=1, description="Budget of the first step; default the minimum")
    by: int = Field(100, ge=1, description="Actions by which the window grows and shrinks")
    margin: int = Field(100, ge=0, description="How far below the window an effective length still counts as a hit")
    hits: float = Field(0.1, gt=0, le=1, description="Share of rollouts that must hit for the window to grow")
    patience: int = Field(3, ge=1, description="Steps in a row without enough hits until the window shrinks")

    @model_validator(mode="after")
    def _is_a_range(self) -> Window:
        start = self.minimum if self.start is None else self.start
        if not self.minimum <= start <= self.maximum:
            raise ValueError(
                f"start is {start}, and the window goes from minimum={self.minimum} to maximum={self.maximum}; take a "
                "start between them"
            )
        return self

    @property
    def longest(self) -> int | None:
        return self.maximum

    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context) -> WindowCourse:
        return WindowCourse(self, ShuffledCourse(prompts, per_step, context.seed))


class WindowCourse(Course):
    """A built window. State: its length, and the steps since it was hit or moved."""

    def __init__(self, settings: Window, inner: ShuffledCourse):
        self.settings, self.inner = settings, inner
        self.length = settings.minimum if settings.start is None else settings.start
        self.missed = 0

    def next(self, step: int, signals: Mapping[str, float], asker: Asker) -> Draw:
        draw = self.inner.next(step, signals, asker)
        return Draw(draw.prompts, self.length, {"curriculum/window": float(self.length)})

    def saw(
        self,
        trajectories: Trajectories,
        values: Mapping[str, torch.Tensor],
        signals: Mapping[str, float],
        gather: Gather,
    ) -> dict[str, float]:
        return self.settle(gather(trajectories, sums_by_trajectory(values["reliable"], trajectories.lengths)))

    def settle(self, effective: torch.Tensor) -> dict[str, float]:
        """Move the window by a step's effective lengths, float32 `[B]`; what is logged of that."""
        settings = self.settings
        wanted = max(settings.minimum, self.length - settings.margin)
        share = float((effective >= wanted).float().mean())
        measured = {
            "curriculum/hits": share,
            "curriculum/effective_length": float(effective.mean()),
            "curriculum/effective_length_least": float(effective.min()),
            "curriculum/effective_length_most": float(effective.max()),
        }
        if share >= settings.hits:
            self.length, self.missed = min(self.length + settings.by, settings.maximum), 0
        elif self.missed + 1 >= settings.patience:
            self.length, self.missed = max(self.length - settings.by, settings.minimum), 0
        else:
            self.missed += 1
        return measured

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length, "missed": self.missed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.length, self.missed = state["length"], state["missed"]
