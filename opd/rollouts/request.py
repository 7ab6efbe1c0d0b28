"""What a rollout is asked for: one object, so that whatever a step needs goes one way, from the loop to who writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from opd.choice import Settings
from opd.context import Context
from opd.prompts import Prompt

S = TypeVar("S", bound=Settings)
Other = TypeVar("Other", bound=Settings)


@dataclass(frozen=True)
class Request(Generic[S]):
    """`group` trajectories of each prompt, at most `budget` actions long.

    Attributes:
        prompts: P prompts.
        group: G, trajectories of each.
        budget: most actions of a trajectory, those in `begun` not counted.
        stream: names the random stream (the loop passes the step); the same seed, stream and prompts give the same
            trajectories.
        settings: the rollout's at this step, numbers in the places of schedules.
        context: facts of the run at this step.
        begun: P * G sequences of actions that another source has written already; they stand before the actions that
            are drawn now and are not part of what is returned.
        training: whether a step of training learns from them.
    """

    prompts: Sequence[Prompt]
    group: int
    budget: int
    stream: int
    settings: S
    context: Context
    begun: Sequence[torch.Tensor] | None = None
    training: bool = False

    def to(self, settings: Other, which: Sequence[int] | None = None, budget: int | None = None) -> Request[Other]:
        """This request to a part of the source, under the part's own settings.

        Args:
            which: indices of its share of the prompts; default all.
            budget: default this one's.
        """
        prompts, begun = self.prompts, self.begun
        if which is not None:
            prompts = [prompts[i] for i in which]
            begun = None if begun is None else [begun[i * self.group + g] for i in which for g in range(self.group)]
        longest = self.budget if budget is None else budget
        return Request(prompts, self.group, longest, self.stream, settings, self.context, begun, self.training)
