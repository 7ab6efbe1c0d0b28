"""Prompts of a procedural task of `opd` itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

from opd.choice import OneOf, kind_of
from opd.procedural import Split, Task
from opd.prompts.base import Prompts


class ProceduralPrompts(Prompts):
    """`size` different problems of one split of a task, drawn by `seed`.

    Rows have `prompt`, `answer`, `response` (a reference completion), `difficulty` and `task`. Use with
    `verifier: {kind: exact_match, pattern: '^[^#]*#([^#]*)$'}`.
    """

    kind: Literal["procedural"] = "procedural"
    task: Annotated[Task, OneOf(Task)] = Field(description="What is asked")
    size: int = Field(100, ge=1, le=10_000_000, description="Rows to draw")
    seed: int = Field(0, ge=0, description="Of the draw")
    split: Split = Field("train", description="Rows of one split occur in no other")

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        kind = kind_of(self.task)
        return [
            (f"{kind} {self.split}[{i}]", {**asdict(row), self.column: row.prompt, "task": kind})
            for i, row in enumerate(self.task.examples(self.size, self.seed, self.split))
        ]
