"""A control of the reproduction of Uni-OPD: calibrated margins whose labels say nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from opd.context import Context
from opd.distributions import Target
from opd.shaping.margin import MarginShaper
from opd.shaping.margin_shift import MarginShift
from opd.trajectories import Trajectories


class ShuffledShift(MarginShift):
    """`margin_shift` by verdicts that were dealt anew within each group: as many right ones, at other places."""

    kind: Literal["shuffled_shift"] = "shuffled_shift"  # type: ignore[assignment]

    def build(self, context: Context) -> ShuffledShaper:
        return ShuffledShaper(context.seed)


class ShuffledShaper(MarginShaper[ShuffledShift]):
    """The built shaping. State: how many steps it saw, which with the seed makes its draws."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.steps = seed, 0

    def look(
        self,
        trajectories: Trajectories,
        targets: Sequence[Target],
        settings: ShuffledShift,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> Trajectories:
        assert trajectories.rewards is not None
        dealt = trajectories.rewards.clone()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
        self.steps += 1
        for group in trajectories.groups.unique():
            here = (trajectories.groups == group).nonzero()[:, 0]
            dealt[here] = dealt[here[torch.randperm(len(here), generator=generator)]]
        found = super().look(replace(trajectories, rewards=dealt), targets, settings, sum_over_processes)
        return replace(found, rewards=trajectories.rewards)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
