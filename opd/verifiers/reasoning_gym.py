"""Each reasoning-gym task's own scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from opd.errors import DataError
from opd.prompts import Prompt
from opd.verifiers.base import CompletionVerifier


class ReasoningGym(CompletionVerifier):
    """Scores rows that `prompts.kind: reasoning_gym` made; other rows have no verdict."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    modality: ClassVar[str | None] = "language"
    reads: ClassVar[str | None] = "reasoning_gym"

    @property
    def needs(self) -> str:
        return "the column 'reasoning_gym' of prompts.kind: reasoning_gym"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            origin = prompt.fields.get("reasoning_gym")
            if origin is not None and not (isinstance(origin, dict) and {"task", "entry"} <= origin.keys()):
                raise DataError(
                    f"{prompt.where or prompt.id}: column 'reasoning_gym' holds no task with its entry; make rows with "
                    "prompts.kind: reasoning_gym"
                )

    def score(self, prompt: Prompt, completion: str) -> float | None:
        if not self.judges(prompt):
            return None
        from reasoning_gym import get_score_answer_fn

        origin = prompt.fields["reasoning_gym"]
        return float(get_score_answer_fn(origin["task"])(completion.strip(), origin["entry"]))
