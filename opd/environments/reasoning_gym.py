"""The tasks of reasoning-gym as episodes of one turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from opd.environments.base import Start, Turn
from opd.environments.text import TextEnvironment, TextWorld
from opd.errors import DataError, nearest
from opd.language.calls import Reply
from opd.prompts.messages import Messages


class ReasoningGymEnvironment(TextEnvironment):
    """A question of each start's seed; the reply is the answer, the outcome is the task's own score, and the episode is
    over."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    repeats: ClassVar[bool | None] = True
    only: list[str] = Field(min_length=1, description="Tasks by their names in reasoning_gym")
    options: dict[str, Any] = Field({}, description="Further arguments of reasoning_gym.create_dataset, for every task")

    @field_validator("options")
    @classmethod
    def _of_the_task(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [key for key in ("seed", "size") if key in value]:
            raise ValueError(
                f"{taken[0]!r} is not the task's: every episode is one question, of its row's seed; remove it (the "
                "rows' seeds are prompts.seed, and how many there are is prompts.per_task)"
            )
        return value

    def tasks(self) -> Mapping[str, str]:
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise DataError("environment 'reasoning_gym' needs the extra: pip install 'opd[tasks]'") from None
        for task in self.only:
            if task not in DATASETS:
                raise DataError(f"environment.only: reasoning-gym has no task {task!r}{nearest(task, DATASETS)}")
        return {task: f"a question of {task}" for task in dict.fromkeys(self.only)}

    def build(self) -> QuestionWorld:
        self.tasks()
        return QuestionWorld(self)


class QuestionWorld(TextWorld):
    """The built environment."""

    def __init__(self, settings: ReasoningGymEnvironment):
        self.settings = settings

    def reset(self, start: Start) -> Turn[Messages]:
        import reasoning_gym

        # The first entry depends on the seed alone, whatever else is drawn.
        self.data = reasoning_gym.create_dataset(start.task, size=1, seed=start.seed, **self.settings.options)
        self.entry = self.data[0]
        return Turn([{"role": "user", "content": self.entry["question"]}])

    def step(self, action: Reply) -> Turn[Messages]:
        score = float(self.data.score_answer(action.text, self.entry))
        return Turn([], score, done=True)
