"""Whose turn it is where a prompt has several stored answers: each visit of the prompt takes the next ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from opd.prompts import Prompt


class Turns:
    """Counts the visits of prompts, the same in every process, since each is told of the whole step."""

    def __init__(self) -> None:
        self.visits: Counter[str] = Counter()
        self._now: dict[tuple[str, int], int] = {}

    def drawn(self, prompts: Sequence[Prompt]) -> None:
        """Count one step's prompts; one that stands there twice (`Prompt.repeat`) is visited twice."""
        self._now = {}
        for prompt in prompts:
            self._now[prompt.id, prompt.repeat] = self.visits[prompt.id]
            self.visits[prompt.id] += 1

    def of(self, prompt: Prompt, stream: int) -> int:
        """Visits before this one. Where nobody counts (a source that is asked outside of a run), streams do."""
        return self._now.get((prompt.id, prompt.repeat), max(stream, 0) + prompt.repeat)

    def state_dict(self) -> dict[str, Any]:
        """Nothing as long as nothing was counted."""
        return {"visits": dict(self.visits)} if self.visits else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.visits = Counter(state.get("visits", {}))
