"""Verifiers: an exact outcome for a completion."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from opd.choice import Choice
from opd.prompts import Prompt


class Verifier(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "verifier"

    @abstractmethod
    def score(self, prompt: Prompt, completion: Any) -> float | None:
        """Reward in [0, 1], or None when this prompt has no verifiable answer (it then counts in no average).

        `completion` is what the student's policy makes of a trajectory: a text, or float32 `[H, W, 3]` in 0..1.
        """
