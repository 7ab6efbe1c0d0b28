"""Procedural prompts with exact scoring, from `reasoning-gym`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from opd.errors import DataError, nearest
from opd.prompts.base import Prompts


class ReasoningGymPrompts(Prompts):
    """`size` entries of each task, drawn by `seed`. Use with `verifier: reasoning_gym`."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: list[str] = Field(min_length=1, description="By their names in reasoning_gym")
    size: int = Field(100, ge=1, le=10_000_000, description="Rows of each task")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the draw")

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise DataError("prompts.kind 'reasoning_gym' needs the extra: pip install 'opd[tasks]'") from None
        rows = []
        for task in self.tasks:
            if task not in DATASETS:
                raise DataError(f"prompts.tasks: reasoning-gym has no task {task!r}{nearest(task, DATASETS)}")
            data = reasoning_gym.create_dataset(task, size=self.size, seed=self.seed)
            for i in range(self.size):
                entry = data[i]
                fields = {
                    "id": f"{task}-{self.seed}-{i}",
                    self.column: entry["question"],
                    "answer": entry["answer"],
                    "reasoning_gym": {"task": task, "entry": entry},
                }
                rows.append((f"reasoning-gym {task}[{i}]", fields))
        return rows
