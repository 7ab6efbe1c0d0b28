"""Rewards of drawings: what the prompt asks for, and how clean the picture is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, PositiveFloat, field_validator

from opd.choice import choices_of
from opd.drawings import Drawing, checked
from opd.drawings.quality import quality
from opd.errors import DataError, nearest
from opd.prompts import Prompt
from opd.verifiers.base import CompletionVerifier

Weights = Annotated[dict[str, PositiveFloat], BeforeValidator(lambda v: {v: 1.0} if isinstance(v, str) else v)]

INK = np.where(np.arange(16)[:, None, None] < 12, 0.85, np.zeros((16, 16, 3))).astype(np.float32)
"""A picture with ink and without an object: to score it, a task reads all columns of a row."""

SOUND: set[frozenset[tuple[str, str | int | float]]] = set()
"""Problems that were scored once: thousands of rows have few different ones."""


class DrawingReward(CompletionVerifier):
    """Rewards of pictures, `[H, W, 3]` in 0..1, for rows of `prompts.kind: drawings`.

    `task` is the reward of the row's own task; `count`, `glyph` and `scene` are verdicts on rows of that task only;
    `quality` is one on every row. Of a mixture, a row counts those that it has, by their weights over their sum. A
    picture with a value that is not a number has reward 0.
    """

    kind: Literal["drawing"] = "drawing"
    modality: ClassVar[str | None] = "flow"
    reads: ClassVar[str | None] = "task"
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

    def score(self, prompt: Prompt, completion: object) -> float | None:
        picture, total, summed = checked(completion), 0.0, 0.0
        for name in self._counted(prompt):
            value = 0.0
            if picture is not None:
                value = quality(picture) if name == "quality" else self._score(prompt, picture, self.graded)
            total, summed = total + self.reward[name] * value, summed + self.reward[name]
        return total / summed if summed else None

    def judges(self, prompt: Prompt) -> bool:
        return bool(self._counted(prompt))

    @property
    def needs(self) -> str:
        tasks = choices_of(Drawing) if "task" in self.reward else self.reward
        return f"the column 'task' with {' or '.join(tasks)}"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if set(self._counted(prompt)) - {"quality"}:
                plain = {k: v for k, v in prompt.fields.items() if k != "id" and isinstance(v, str | int | float)}
                problem = frozenset(plain.items())
                if problem not in SOUND:
                    # Graded in any case: a number that stands there as a text is found by counting with it.
                    self._score(prompt, INK, graded=True)
                    SOUND.add(problem)

    def _counted(self, prompt: Prompt) -> list[str]:
        """The rewards that a row has."""
        own = prompt.fields.get("task")
        own = own if isinstance(own, str) and own in choices_of(Drawing) else None
        return [name for name in self.reward if name == "quality" or (own is not None and name in ("task", own))]

    def _score(self, prompt: Prompt, picture: np.ndarray, graded: bool) -> float:
        task: Any = choices_of(Drawing)[prompt.fields["task"]]
        try:
            return float(task.score(prompt.fields, picture, graded))
        except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            raise DataError(
                f"{prompt.where or prompt.id}: its columns are none of a {prompt.fields['task']} drawing "
                f"({type(error).__name__}: {error}); make rows with prompts.kind: drawings"
            ) from None
