"""Group-relative policy optimisation: a verifier's reward, compared within the group of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from opd.distributions import Distribution, Target
from opd.errors import IncompatibleError
from opd.objectives.base import Objective, Writing, check_draws
from opd.objectives.surrogate import clipped
from opd.operator import Loss, action_loss
from opd.schedules import OverSteps
from opd.trajectories import Trajectories


class GRPO(Objective):
    """`-min(r A, clip(r, 1 - clip, 1 + clip_high) A)` with `r = q(a) / behaviour(a)` and a group's advantage
    `A = (R - mean R) / (std R + 1e-6)` (Shao et al. 2024); `normalise: false` keeps `R - mean R` (Liu et al. 2025);
    `spread: batch` divides by `std + 1e-4` of all rewards of the step (Flow-GRPO, Liu et al. 2025). For images `q(a)`
    is the geometric mean over the numbers of a latent, hence a clip of 1e-4 there. One update is taken on a batch.

    Groups whose rewards are all equal, and prompts without a verdict, carry no signal. A KL to a reference is a second
    objective: `{kind: reverse_kl, weight: 0.01, teacher: reference}` with a teacher `{kind: self, mode: frozen, name:
    reference}`; the k3 estimator of the paper, taken as a loss, would descend forward KL.
    """

    kind: Literal["grpo"] = "grpo"
    called: ClassVar[str] = "surrogate"
    needs_reward: ClassVar[bool] = True
    compares_group: ClassVar[bool] = True
    clip: float = Field(0.2, gt=0.0, lt=1.0, description="How far the ratio may leave 1")
    clip_high: float | None = Field(None, gt=0.0, description="Upper clip; default the same as clip")
    normalise: bool = Field(True, description="Divide advantages by a standard deviation of rewards")
    spread: Literal["group", "batch"] = Field(
        "group", description="Whose, with normalise: each group's own, or that of all rewards of the step"
    )
    bound: Annotated[float, OverSteps(gt=0)] | None = Field(None, description="Largest size of an advantage")

    def advantages(self, trajectories: Trajectories) -> torch.Tensor:
        """float32 `[B]`; 0 where a prompt has no verdict."""
        assert trajectories.rewards is not None
        assert trajectories.group_mean is not None
        assert trajectories.group_spread is not None
        centred = (trajectories.rewards - trajectories.group_mean).nan_to_num()
        if not self.normalise:
            return self._bounded(centred)
        if self.spread == "batch":
            assert trajectories.reward_spread is not None
            return self._bounded(centred / (trajectories.reward_spread + 1e-4))
        # The sample's standard deviation, as in the paper's code; a group of one has none and no signal.
        return self._bounded(centred / (trajectories.group_spread + 1e-6))

    def _bounded(self, advantages: torch.Tensor) -> torch.Tensor:
        return advantages if self.bound is None else advantages.clamp(-self.bound, self.bound)

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        device = trajectories.actions.device
        lengths = trajectories.lengths.to(device)
        advantage = self.advantages(trajectories).to(device).repeat_interleave(lengths)
        low, high = 1 - self.clip, 1 + (self.clip if self.clip_high is None else self.clip_high)
        behaviour = trajectories.behaviour_log_probs

        def rule(log_q: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return clipped(log_q, behaviour[index], advantage[index], low, high)

        # Positions without an advantage have no gradient and need no logits.
        live = weights * (advantage != 0)
        actions = trajectories.actions
        loss = action_loss(rule, student, live, actions, trajectories.lengths, per_example=per_example)
        return replace(loss, computed=live != 0)

    def check_trajectories(self, rollout: Writing) -> None:
        check_draws(self, rollout)
        if rollout.learners != {"student"} or not rollout.current:
            raise IncompatibleError(
                "objective 'grpo' needs the student's own samples with their log-probabilities: take rollout: student, "
                "or sde for a flow model"
            )
