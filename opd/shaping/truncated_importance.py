"""Samples of somebody who is not quite the student count by how likely the student would have drawn them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.distributions import Categorical, Distribution, Sampled, Target
from opd.errors import IncompatibleError
from opd.objectives.base import Writing
from opd.schedules import OverSteps
from opd.shaping.base import Shape, Shaper, Shaping
from opd.trajectories import Trajectories


class TruncatedImportance(Shaping):
    """A position weighs `min(limit, q(a) / b(a))`, detached: `q` is the student as it trains now and `b` the
    distribution that the action was drawn from, as a server's in bfloat16 or one of weights one step old is. The
    limit bounds the variance and, where it is reached, leaves a bias. The state's own probability is not corrected.

    Measured are `importance`, the weight, and `importance_cut`, 1 where the limit was reached.
    """

    kind: Literal["truncated_importance"] = "truncated_importance"
    modality: ClassVar[str | None] = "language"
    measures: ClassVar[tuple[str, ...]] = ("importance", "importance_cut")
    corrects: ClassVar[bool] = True
    limit: Annotated[float, OverSteps(ge=1)] = Field(2.0, description="Largest weight")

    def words(self, measured: Mapping[str, float], reward: float | None) -> str | None:
        share = measured.get("importance_cut", 0.0)
        return f"{share:.0%} of its tokens at the largest importance weight" if share else None

    def build(self, context: Context) -> TruncatedImportanceShaper:
        return TruncatedImportanceShaper()

    def check_trajectories(self, rollout: Writing, exact: bool) -> None:
        if rollout.learners != {"student"} or not rollout.current or not exact:
            raise IncompatibleError(
                "shaping 'truncated_importance' needs samples of the student's whole distribution with their "
                "log-probabilities: take rollout: student without top_p and top_k"
            )


class TruncatedImportanceShaper(Shaper[TruncatedImportance]):
    """The built shaping."""

    @torch.no_grad()
    def __call__(
        self, student: Distribution, targets: Sequence[Target], micro: Trajectories, settings: TruncatedImportance
    ) -> Shape:
        assert isinstance(student, Categorical)
        now = Sampled.of(student, micro.actions).log_probs.float()
        ratio = (now - micro.behaviour_log_probs.to(now)).exp()
        weights = ratio.clamp(max=settings.limit)
        measured = {"importance": weights, "importance_cut": (ratio > settings.limit).float()}
        return Shape(weights, measured=measured)
