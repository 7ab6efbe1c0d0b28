"""What shapings that compare trajectories by their outcome share: who is right, and which ones are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from pydantic import Field

from opd.shaping.base import Shaping
from opd.trajectories import Trajectories

KEPT = "outcome_kept"
"""Column by which a shaping says which trajectories it dropped: 0 at all their positions, 1 at the others'."""


class ByOutcome(Shaping):
    """Base of shapings that compare a step's trajectories by their rewards."""

    needs_reward: ClassVar[bool] = True
    scope: Literal["group", "global"] = Field(
        "group", description="Compare within the trajectories of one prompt, or over those of the whole step"
    )
    right_from: float = Field(1.0, description="Least reward of a right trajectory; those with less are wrong")

    @property
    def compares_group(self) -> bool:
        return self.scope == "group"


@dataclass(frozen=True)
class Compared:
    """Numbers of the trajectories that are compared with each other: every member of a set on this process.

    Attributes:
        numbers: by name, `[M]` of the M trajectories of the set, those of other processes among them.
        mine: int64, places of this process's trajectories in the set.
        here: int64, which of this process's trajectories they are.
    """

    numbers: Mapping[str, torch.Tensor]
    mine: torch.Tensor
    here: torch.Tensor


def compared(
    trajectories: Trajectories, numbers: Mapping[str, torch.Tensor], scope: Literal["group", "global"]
) -> list[Compared]:
    """The sets of trajectories that are compared, each with its share of the `[B]` numbers: one a group, whose members
    are never on two processes, or one for all. In scope `global` every process must ask."""
    if scope == "group":
        members = [(trajectories.groups == group).nonzero()[:, 0] for group in trajectories.groups.unique()]
        return [
            Compared({name: values[here] for name, values in numbers.items()}, torch.arange(len(here)), here)
            for here in members
        ]
    parts: Sequence[dict[str, torch.Tensor]] = gather_object([dict(numbers)])
    sizes = [len(next(iter(part.values()))) for part in parts]
    own = torch.arange(len(trajectories))
    together = {name: torch.cat([part[name] for part in parts]) for name in numbers}
    return [Compared(together, own + sum(sizes[: PartialState().process_index]), own)]


def right_and_wrong(trajectories: Trajectories, right_from: float) -> tuple[torch.Tensor, torch.Tensor]:
    """bool `[B]` each, on the CPU: trajectories with a reward of `right_from` or more, and with less. One without a
    verdict is neither, and neither is one that an earlier shaping dropped."""
    rewards = trajectories.rewards
    rewards = torch.full((len(trajectories),), torch.nan) if rewards is None else rewards.cpu()
    if KEPT in trajectories.columns:
        first = trajectories.lengths.cumsum(0) - trajectories.lengths
        rewards = rewards.where(trajectories.columns[KEPT].cpu()[first] != 0, torch.nan)
    return rewards >= right_from, rewards < right_from
