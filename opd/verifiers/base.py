"""Verifiers: an exact outcome for a completion."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, ClassVar

from opd.choice import Choice
from opd.errors import DataError, nearest
from opd.prompts import Prompt

TEXTS = ("answer", "text")
"""Columns that verifiers read as one text."""
READABLE = (str, int, float, Decimal)
"""Types of a value that stand for one text."""
LARGEST = 2**53
"""Beyond it floats do not tell neighbouring whole numbers apart."""


def as_text(value: object) -> str:
    """A text or number of a row as verifiers compare it: whole numbers without a point, whatever their type."""
    if isinstance(value, float | Decimal) and -LARGEST < value < LARGEST and value == int(value):
        return str(int(value))
    return str(value)


class Verifier(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "verifier"
    reads: ClassVar[str | None] = None
    """Column without which a prompt has no verdict; None where that is not up to one column."""

    @abstractmethod
    def score(self, prompt: Prompt, completion: Any) -> float | None:
        """Reward in [0, 1], or None when this prompt has no verifiable answer (it then counts in no average).

        `completion` is what the student's policy makes of a trajectory: a text, or float32 `[H, W, 3]` in 0..1.
        """

    def judges(self, prompt: Prompt) -> bool:
        """Whether `score` gives verdicts on completions of this prompt."""
        if self.reads is None:
            return True
        value = prompt.fields.get(self.reads)
        # An empty cell, or the NaN of one, is no answer: a completion in which none is found would be right by it.
        return value is not None and (bool(value.strip()) if isinstance(value, str) else value == value)

    @property
    def needs(self) -> str:
        """What a prompt must have for a verdict, as messages name it."""
        return f"the column {self.reads!r}"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` for a prompt whose columns `score` could not read; one without a verdict is none."""
        for prompt in prompts:
            value = prompt.fields.get(self.reads) if self.reads in TEXTS else None
            if value is not None and not isinstance(value, READABLE):
                raise DataError(
                    f"{prompt.where or prompt.id}: column {self.reads!r} holds {type(value).__name__}; a verifier "
                    "reads a text or a number there"
                )

    def check_verdicts(self, prompts: Sequence[Prompt], learner: str) -> None:
        """Raise `DataError` when none of the prompts has a verdict, so that `learner` would have no gradient."""
        if any(self.judges(prompt) for prompt in prompts):
            return
        columns = sorted({name for prompt in prompts for name in prompt.fields})
        close = nearest(self.reads, [c for c in columns if c != self.reads]) if self.reads is not None else ""
        raise DataError(
            f"verifier {type(self).model_fields['kind'].default!r} gives a verdict on none of the {len(prompts)} "
            f"training prompts, and {learner} learns from verdicts: it needs {self.needs}, and their columns are "
            f"{columns}{close}. Give the rows that column, or take another verifier"
        )
