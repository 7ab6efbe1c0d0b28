"""Rewards of drawings: what the prompt asks for, and how clean the picture is."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, PositiveFloat, field_validator

from opd.choice import choices_of
from opd.drawings import Drawing, checked
from opd.drawings.quality import quality
from opd.errors import DataError, nearest
from opd.prompts import Prompt
from opd.verifiers.base import Verifier

Weights = Annotated[dict[str, PositiveFloat], BeforeValidator(lambda v: {v: 1.0} if isinstance(v, str) else v)]


class DrawingReward(Verifier):
    """Rewards of pictures, `[H, W, 3]` in 0..1, for rows of `prompts.kind: drawings`.

    `task` is the reward of the row's own task; `count`, `glyph` and `scene` are verdicts on rows of that task only;
    `quality` is one on every row. Of a mixture, a row counts those that it has, by their weights over their sum. A
    picture with a value that is not a number has reward 0.
    """

    kind: Literal["drawing"] = "drawing"
    modality: ClassVar[str | None] = "flow"
    reward: Weights = Field({"task": 1.0}, min_length=1, description="One name, or weights of several")
    graded: bool = Field(True, description="Credit for a part of a task; false gives 1 or 0")

    @field_validator("reward")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        accepted = ("task", "quality", *choices_of(Drawing))
        for name in value:
            if name not in accepted:
                raise ValueError(f"no reward {name!r}{nearest(name, accepted)}; accepted: {', '.join(accepted)}")
        return value

    def score(self, prompt: Prompt, completion: Any) -> float | None:
        tasks: Any = choices_of(Drawing)
        picture, own = checked(completion), prompt.fields.get("task")
        total = summed = 0.0
        for name, weight in self.reward.items():
            if name == "quality":
                value = 0.0 if picture is None else quality(picture)
            elif own in tasks and name in ("task", own):
                value = 0.0 if picture is None else self._score(tasks[own], prompt, picture)
            else:
                continue
            total, summed = total + weight * value, summed + weight
        return total / summed if summed else None

    def _score(self, task: type[Drawing], prompt: Prompt, picture: np.ndarray) -> float:
        try:
            return task.score(prompt.fields, picture, self.graded)
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{prompt.where or prompt.id}: its columns are none of a {prompt.fields['task']} drawing "
                f"({type(error).__name__}: {error}); make rows with prompts.kind: drawings"
            ) from None
