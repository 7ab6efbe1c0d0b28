"""Each reasoning-gym task's own scoring."""

from __future__ import annotations

from typing import ClassVar, Literal

from opd.prompts import Prompt
from opd.verifiers.base import Verifier


class ReasoningGym(Verifier):
    """Scores rows that `prompts.kind: reasoning_gym` made; other rows have no verdict."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    modality: ClassVar[str | None] = "language"

    def score(self, prompt: Prompt, completion: str) -> float | None:
        origin = prompt.fields.get("reasoning_gym")
        if origin is None:
            return None
        from reasoning_gym import get_score_answer_fn

        return float(get_score_answer_fn(origin["task"])(completion.strip(), origin["entry"]))
