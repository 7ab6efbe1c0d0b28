"""Episodes of an environment as prompts: a row for each initial state of each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from opd.choice import OneOf, kind_of
from opd.environments.base import Environment
from opd.prompts.base import Prompts


class EpisodePrompts(Prompts):
    """`per_task` initial states of every task of an environment, for rollouts and evaluations that play.

    Rows have `prompt` (the instruction), `task`, `seed` (of the initial state) and `environment`. Another `seed` has
    other initial states: held-out rows are those of `evaluation.prompts`, the same at every evaluation.
    """

    kind: Literal["episodes"] = "episodes"
    environment: Annotated[Environment, OneOf(Environment)] = Field(description="Where they are played")
    per_task: int = Field(50, ge=1, le=1_000_000, description="Initial states of each task")
    seed: int = Field(0, ge=0, le=10_000, description="Of the initial states")

    @property
    def remote(self) -> str | None:
        return self.environment.remote

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        kind = kind_of(self.environment)
        settings = self.environment.model_dump(mode="json")
        return [
            (
                f"{kind} {task}[{i}]",
                {
                    "id": f"{kind}-{task}-{self.seed}-{i}",
                    self.column: instruction,
                    "task": task,
                    "seed": self.seed * 1_000_000 + i,
                    "environment": settings,
                    **self.environment.columns(task),
                },
            )
            for i in range(self.per_task)
            for task, instruction in self.environment.tasks().items()
        ]
