"""Divergences at the slots of drafted blocks: those that the target accepted, and those that it did not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.distributions import Distribution, Target
from opd.divergences.base import CategoricalDivergence
from opd.divergences.forward_kl import ForwardKL
from opd.divergences.on_support import OnSupport
from opd.divergences.reverse_kl import ReverseKL
from opd.objectives.of_slots import OfSlots, from_first
from opd.operator import Chunk, Compared, Loss, Whole, along_actions
from opd.schedules import OverSteps
from opd.trajectories import Trajectories

Direction = Literal["forward_kl", "reverse_kl"]
"""Which way the drafter moves at a slot: to cover its target, or to keep to what it finds likely."""

KL: dict[str, OnSupport] = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}


FLOOR, NEARLY_ONE, MOST = -10.0, math.log1p(-1e-6), 10.0
"""Bounds of log-probabilities, and of a value, where one token stands for a distribution."""


class OfBlocks(OfSlots, CategoricalDivergence):
    """Base of divergences on one stream of a rollout's blocks, each with its own denominator."""

    variants: ClassVar[tuple[dict[str, Any], ...]] = ()
    accepts: ClassVar[tuple[str, ...]] = ("categorical",)
    alternative: ClassVar[str] = "take teacher: target"

    kl: Direction = Field("forward_kl", description="Its direction")

    estimator: Literal["whole", "token"] = Field(
        "whole",
        description="Over the whole vocabulary, or from one token of each slot: by the two outcomes that it is drawn "
        "or not (forward) or by `p/q - log(p/q) - 1` (reverse)",
    )

    @property
    def descends(self) -> str:
        return self.kl

    @property
    def unbiased(self) -> bool:
        return self.estimator == "whole"

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        columns = self.columns(trajectories)
        if self.estimator == "token":
            live = self.slots(columns).to(weights.device) > 0
            weights, trajectories = weights * live, replace(trajectories, actions=self.tokens(trajectories))
        return super().__call__(student, targets, weights, trajectories, per_example)

    def tokens(self, trajectories: Trajectories) -> torch.Tensor:
        """int64 `[N]`: the token of each slot of the stream that stands for its distribution."""
        return trajectories.actions

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        return KL[self.kl].begin(whole) if self.estimator == "whole" else self._of_tokens

    def _of_tokens(self, chunk: Chunk) -> Compared:
        (target,) = chunk.targets
        log_q, log_p = chunk.taken(), chunk.answered(target).clamp(FLOOR, NEARLY_ONE)
        s = log_q.clamp(FLOOR, NEARLY_ONE)
        p, q = log_p.exp(), s.exp()
        if self.kl == "forward_kl":
            value = p * (log_p - s) + (1 - p) * (torch.log1p(-p) - torch.log1p(-q))
            slope = (q - p) / (1 - q)
        else:
            value, slope = (log_p - s).exp() - (log_p - s) - 1, 1 - (log_p - s).exp()
        inside = (log_q == s) & (value <= MOST)
        weight = torch.as_tensor(target.weight, device=value.device, dtype=value.dtype)
        return along_actions(chunk, weight * value.clamp(max=MOST), weight * slope * inside)

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return KL[self.kl].exact(log_p, log_q)


class Accepted(OfBlocks):
    """The KL at the slots whose proposals the target accepted: `(1 / |I|) sum KL(p || q)` over the step, `q` the
    drafter (Draft-OPD, arXiv 2605.29343); with a decay `sum w_k KL(p || q) / sum w_k`, `w_k = decay ** (k - 1)`."""

    kind: Literal["accepted"] = "accepted"
    correction: bool = Field(
        False, description="Whether the first slot of a block that was not accepted counts here too, beside `rejected`"
    )
    decay: Annotated[float, OverSteps(gt=0, le=1)] = Field(
        1.0, description="Factor from a slot to the next, from the beginning of the block; 1 weighs all alike"
    )

    def slots(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mine = columns["accepted"] | columns["corrected"] if self.correction else columns["accepted"]
        mine = mine if self.estimator == "whole" else mine & (columns["verified"] >= 0)
        return from_first(columns, float(self.decay)) * mine

    def tokens(self, trajectories: Trajectories) -> torch.Tensor:
        """What stands there, the target's own token at a corrected slot."""
        verified = trajectories.columns["verified"]
        return verified.where(verified >= 0, trajectories.actions)


class Rejected(OfBlocks):
    """The KL at the first slot of each block that the target did not accept and at all behind it, each under the
    proposals before it: `sum w_k KL(q || p) / sum w_k` over the step, with `w_k = decay ** (k - 1)` at slot k of the
    block, counted from 1 (Draft-OPD, arXiv 2605.29343)."""

    kind: Literal["rejected"] = "rejected"
    kl: Direction = Field("reverse_kl", description="Its direction")
    decay: Annotated[float, OverSteps(gt=0, le=1)] = Field(
        0.8, description="Factor from a slot to the next, from the beginning of the block; 1 weighs all alike"
    )

    def slots(self, columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return from_first(columns, float(self.decay)) * columns["rejected"]
