"""One step of a run: what its recipe and the facts that its parts share are at that step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd.context import Context
from opd.prompts import Prompt
from opd.rollouts import Request, Rollout

if TYPE_CHECKING:
    from opd.recipe import Recipe


@dataclass(frozen=True)
class Now:
    """Made at the beginning of a step and handed to whatever takes part in it; nothing that is built keeps it.

    Attributes:
        recipe: with numbers in the places of its schedules.
        context: with the step's temperature.
        scheduled: those numbers by `schedule/KEY`, to be logged.
    """

    recipe: Recipe
    context: Context
    scheduled: dict[str, float]

    @classmethod
    def at(cls, recipe: Recipe, context: Context, step: int) -> Now:
        """Step `step` (from 0) of a run of `recipe`."""
        now = recipe.at(step, recipe.steps)
        numbers = {f"schedule/{key}": float(s.at(step, recipe.steps)) for key, s in recipe.scheduled().items()}
        return cls(now, context.with_(temperature=now.temperature), numbers)

    def request(
        self, prompts: Sequence[Prompt], budget: int | None = None, *, stream: int, group: int | None = None
    ) -> Request[Rollout]:
        """A request to the recipe's rollout; `budget` and `group` are by default the recipe's."""
        rollout, batch = self.recipe.rollout, self.recipe.batch
        return Request(
            prompts,
            batch.group if group is None else group,
            rollout.budget if budget is None else budget,
            stream,
            rollout,
            self.context,
        )
