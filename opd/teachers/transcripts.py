"""What was debated before: in memory, in checkpoints, and on disk where a recipe says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from opd.choice import Settings
from opd.files.bounded import BoundedFolder
from opd.language.source import cache_folder


class TranscriptSettings(Settings):
    """Where debates are kept for other runs, and how many."""

    path: str | None = Field(None, description="Folder; default debates/ in $OPD_CACHE or ~/.cache/opd")
    gigabytes: float = Field(4.0, gt=0, description="Of 1e9 bytes; the longest unused go first")


@dataclass(frozen=True)
class Debate:
    """One debate: `rounds[r][k]` is what expert k wrote in round r, and `tokens` how many all texts took."""

    rounds: tuple[tuple[str, ...], ...]
    tokens: int

    def as_plain(self) -> dict[str, Any]:
        return {"rounds": [list(texts) for texts in self.rounds], "tokens": self.tokens}

    @classmethod
    def of_plain(cls, value: object, rounds: int, experts: int) -> Debate:
        """Inverse of `as_plain`; raises `ValueError` for anything else than so many rounds of so many texts."""
        if isinstance(value, Mapping) and isinstance(value.get("tokens"), int):
            found = value.get("rounds")
            texts = [tuple(each) for each in found if isinstance(each, list)] if isinstance(found, list) else []
            right = len(texts) == rounds and all(len(each) == experts for each in texts)
            if right and all(isinstance(text, str) for each in texts for text in each):
                return cls(tuple(texts), value["tokens"])
        raise ValueError(f"no debate of {experts} experts over {rounds} rounds")


class Transcripts:
    """Debates by the hash of all that they depend on.

    Args:
        settings: of the folder; None keeps them in memory alone.
        rounds, experts: what a debate must have.
    """

    def __init__(self, settings: TranscriptSettings | None, rounds: int, experts: int):
        self.rounds, self.experts = rounds, experts
        self.held: dict[str, Debate] = {}
        self.files: BoundedFolder | None = None
        if settings is not None:
            place = Path(settings.path).expanduser() if settings.path else cache_folder() / "debates"
            self.files = BoundedFolder(place, settings.gigabytes, ".json", "teacher.cache")

    def find(self, key: str) -> Debate | None:
        """What was debated under a key; a file that holds something else is none."""
        if key not in self.held and self.files is not None:
            path = self.files.path(key)
            try:
                found = Debate.of_plain(json.loads(path.read_bytes()), self.rounds, self.experts)
                self.files.used(path)
            except (OSError, ValueError, RecursionError):
                return None
            self.held[key] = found
        return self.held.get(key)

    def keep(self, key: str, debate: Debate) -> None:
        self.held[key] = debate
        if self.files is not None:
            self.files.keep(self.files.path(key), json.dumps(debate.as_plain()).encode())

    def state_dict(self) -> dict[str, Any]:
        """All that are in memory, so that a run goes on under the debates that it began with."""
        return {key: debate.as_plain() for key, debate in self.held.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.held = {key: Debate.of_plain(value, self.rounds, self.experts) for key, value in state.items()}
