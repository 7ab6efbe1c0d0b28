"""Prompts of a drawing task of `opd` itself, with reference pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from opd.choice import OneOf, kind_of
from opd.drawings import Drawing, Split
from opd.prompts.base import Prompts


class DrawingPrompts(Prompts):
    """`size` drawings of one split of a task, drawn by `seed`.

    Rows have `prompt`, `task`, `image` (uint8 `[H, W, 3]`, a drawing of the prompt) and what the task's reward reads.
    Use with `verifier: drawing`.
    """

    kind: Literal["drawings"] = "drawings"
    task: Annotated[Drawing, OneOf(Drawing)] = Field(description="What is drawn")
    size: int = Field(100, ge=1, description="Rows to draw")
    seed: int = Field(0, description="Of the draw")
    split: Split = Field("train", description="Rows of one split occur in no other")

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        kind = kind_of(self.task)
        return [
            (f"{kind} {self.split}[{i}]", {**row, self.column: row["prompt"]})
            for i, row in enumerate(self.task.rows(self.size, self.seed, self.split))
        ]
