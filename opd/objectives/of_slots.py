"""Base of objectives on the slots of drafted blocks, each weighed by its place in the block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch

from opd.choice import kind_of
from opd.errors import IncompatibleError
from opd.objectives.base import Objective, Writing
from opd.reduction import Reduction, sums_by_trajectory
from opd.trajectories import Trajectories


class OfSlots(Objective):
    """Of some slots of a rollout's blocks, with a denominator of their own: the sum of their weights in the whole step,
    so that an objective without a slot adds nothing."""

    modality: ClassVar[str | tuple[str, ...] | None] = "language"

    @abstractmethod
    def slots(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 `[N]`: what each slot weighs beside the others of this objective; 0 outside."""

    def position_weights(
        self,
        trajectories: Trajectories,
        reduction: Reduction,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
        expected: int | None = None,
    ) -> torch.Tensor:
        share = self.slots(self.columns(trajectories)).to(trajectories.learn.device)
        mine = replace(trajectories, learn=trajectories.learn & (share > 0))
        alike = super().position_weights(mine, reduction, sum_over_processes, expected)
        weighed = alike * share
        how = self.reduction or reduction
        if how == "sequence_sum":
            return weighed
        if how == "sequence_mean":
            before, after = (sums_by_trajectory(each, trajectories.lengths) for each in (alike, weighed))
            factor = (before / after.where(after > 0, 1.0)).repeat_interleave(trajectories.lengths.to(share.device))
            return weighed * factor
        before, after = (sum_over_processes(each.sum()) for each in (alike, weighed))
        return weighed * (before / after if float(after) else 0.0)

    def check_trajectories(self, rollout: Writing) -> None:
        if not rollout.drafts:
            raise self._without_blocks()
        super().check_trajectories(rollout)

    def _without_blocks(self) -> IncompatibleError:
        return IncompatibleError(
            f"objective {kind_of(self)!r} looks at the slots of drafted blocks, and this rollout drafts none; take "
            "rollout: speculative or anchored, with student.kind draft"
        )

    def columns(self, trajectories: Trajectories) -> Mapping[str, torch.Tensor]:
        """Those of the trajectories.

        Raises:
            IncompatibleError: they have no blocks.
        """
        if not {"slot", "accepted", "rejected", "corrected", "verified"} <= trajectories.columns.keys():
            raise self._without_blocks()
        return trajectories.columns


def from_first(columns: Mapping[str, torch.Tensor], decay: float) -> torch.Tensor:
    """float32 `[N]`: `decay ** (k - 1)` at slot k of a block, counted from 1."""
    return decay ** (columns["slot"] - 1).float()
