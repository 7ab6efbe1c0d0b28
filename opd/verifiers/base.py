"""Verifiers: an exact outcome for a completion."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from opd.choice import Choice
from opd.errors import DataError, nearest
from opd.prompts import Prompt


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
        return self.reads is None or prompt.fields.get(self.reads) is not None

    @property
    def needs(self) -> str:
        """What a prompt must have for a verdict, as messages name it."""
        return f"the column {self.reads!r}"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` for a prompt whose columns `score` could not read; one without a verdict is none."""

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
