"""Supervised fine-tuning: imitate the actions of the trajectories, whoever wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from opd.distributions import Distribution, Gaussian, Target
from opd.errors import IncompatibleError
from opd.objectives.base import Objective, Writing
from opd.operator import Loss, action_loss
from opd.trajectories import Trajectories


class SFT(Objective):
    """`-log q(a_t)`: hard labels. On `rollout: data` it is supervised fine-tuning, on `rollout: teacher`
    sequence-level distillation (Kim and Rush 2016). Soft labels are `forward_kl` on the same trajectories: its
    gradient is that of the cross-entropy with the teacher's distribution. Logged: `nll`, the negative log-likelihood of
    the actions.

    Of a flow model on `rollout: noised` it is flow matching: half the squared error of the velocity, up to a constant
    at each time; `squared_error` in the log is the error itself, the mean over a latent's numbers."""

    kind: Literal["sft"] = "sft"
    called: ClassVar[str] = "nll"
    alone: ClassVar[bool] = True

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        loss = action_loss(
            lambda log_q, index: (-log_q, -torch.ones_like(log_q)),
            student,
            weights,
            trajectories.actions,
            trajectories.lengths,
            per_example=per_example,
        )
        if isinstance(student, Gaussian):
            return replace(loss, measured={"squared_error": student.detach().square(trajectories.actions)})
        return replace(loss, measured={"nll": loss.values})

    def check_trajectories(self, rollout: Writing) -> None:
        if rollout.learners == {"student"}:
            raise IncompatibleError(
                "objective 'sft' on the student's own samples has no expected gradient: take rollout: data, "
                "rollout: teacher or a mixture (of a flow model: noised, or sde with a teacher)"
            )
