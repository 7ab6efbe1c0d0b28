"""`Target`: what one teacher says of N states, and how much it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd.distributions.base import Distribution
from opd.distributions.routed import joined


@dataclass(frozen=True)
class Target:
    """One teacher's answer for N positions and its weight, a number or `[N]`. A loss sums over several.

    `teacher` is the name that the recipe gave to who answered. `offset`, `[N]` nats or None, is what a shaping adds to
    its log-probability of each action taken; objectives over whole distributions cannot add it. `missing`, bool `[N]`
    or None, marks the trajectories that it was asked about and did not answer: the distributions there mean nothing,
    and a step goes on without those trajectories.
    """

    distribution: Distribution
    weight: float | torch.Tensor = 1.0
    teacher: str | None = None
    offset: torch.Tensor | None = None
    missing: torch.Tensor | None = None

    def select(self, index: slice | torch.Tensor) -> Target:
        weight = self.weight[index] if isinstance(self.weight, torch.Tensor) else self.weight
        offset = None if self.offset is None else self.offset[index]
        missing = self.missing
        if missing is not None:
            missing = missing[index if isinstance(index, slice) else index.to(missing.device)]
        return Target(self.distribution.select(index), weight, self.teacher, offset, missing)


def joined_targets(parts: Sequence[Target], positions: Sequence[torch.Tensor]) -> Target:
    """One teacher's answers for N positions of several for parts of them: the rows of part k, in order, belong at the
    int64 `positions[k]`, which hold each of N positions once."""
    weights: float | torch.Tensor = parts[0].weight
    if any(isinstance(part.weight, torch.Tensor) or part.weight != weights for part in parts):
        rows = [torch.as_tensor(part.weight).expand(len(part.distribution)) for part in parts]
        weights = torch.cat([row.to(rows[0].device, torch.float32) for row in rows])
        weights = weights[torch.cat(list(positions)).argsort().to(weights.device)]
    distribution = joined([part.distribution for part in parts], positions)
    offset = None
    if any(part.offset is not None for part in parts):
        rows = [torch.zeros(len(p.distribution)) if p.offset is None else p.offset.cpu() for p in parts]
        offset = torch.cat(rows)[torch.cat(list(positions)).argsort().cpu()]
    missing = None
    if any(part.missing is not None for part in parts):
        marks = [torch.zeros(len(p.distribution)).bool() if p.missing is None else p.missing.cpu() for p in parts]
        missing = torch.cat(marks)[torch.cat(list(positions)).argsort().cpu()]
    return Target(distribution, weights, parts[0].teacher, offset, missing)
