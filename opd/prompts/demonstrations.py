"""Episodes of a data set of LeRobot as prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from opd.acting.lerobot import open_demonstrations
from opd.prompts.base import Prompts


class DemonstrationPrompts(Prompts):
    """A row for each episode of a data set in LeRobot's format (v2 with images, or v3), for rollout `demonstrations`.

    Rows have `prompt` and `task` (the instruction), `dataset` and `episode`. `opd rollout` of a simulator writes such a
    data set.
    """

    kind: Literal["demonstrations"] = "demonstrations"
    path: str = Field(description="Folder of the data set")
    per_task: int | None = Field(None, ge=1, description="First episodes of each task; default all")

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        found, seen = [], Counter[str]()
        for place, episode in enumerate(open_demonstrations(self.path).episodes):
            seen[episode.task] += 1
            if self.per_task is None or seen[episode.task] <= self.per_task:
                where = f"{self.path} episode {episode.index}"
                row = {self.column: episode.task, "task": episode.task, "dataset": self.path, "episode": place}
                found.append((where, {"id": f"episode-{episode.index}", **row}))
        return found
