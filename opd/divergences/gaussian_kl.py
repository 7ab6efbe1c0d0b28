"""KL between the steps of two flow-matching samplers, and three estimators of its gradient (Flow-OPD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.distributions import Distribution, Gaussian, Target
from opd.divergences.base import Divergence
from opd.errors import IncompatibleError
from opd.objectives.base import Writing
from opd.objectives.surrogate import clipped
from opd.operator import Loss
from opd.reduction import sums_by_trajectory
from opd.scenes import LatentScene, Scene
from opd.trajectories import Trajectories


class GaussianKL(Divergence):
    """`KL(q || p) = |mu_q - mu_p|^2 / (2 std^2)` of the next latent, the mean over its numbers.

    `kl_direct` differentiates it. `pg_sample` is a policy gradient with the log-ratio of the latent that was drawn as
    its reward: the same expected gradient on the student's own samples, with variance. `pg_detached` is a policy
    gradient with the detached KL of the *state* as its reward, as the paper's text writes it. That reward does not
    depend on what was drawn, so its expected gradient is zero: a negative control, not a way to train.
    """

    kind: Literal["gaussian_kl"] = "gaussian_kl"
    modality: ClassVar[str | None] = "flow"
    scene: ClassVar[type[Scene]] = LatentScene
    accepts: ClassVar[tuple[str, ...]] = ("gaussian",)
    alternative: ClassVar[str] = "divergences of language are reverse_kl, forward_kl and the like"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"estimator": "pg_sample"}, {"estimator": "pg_detached"})
    estimator: Literal["kl_direct", "pg_sample", "pg_detached"] = Field(
        "kl_direct", description="pg_detached has zero expected gradient and is a control"
    )
    scale: Literal["kl", "release", "uniform"] = Field(
        "kl",
        description="kl: the divergence as it is; release: times the step in time, as a released code has it; uniform: "
        "the square of the velocities' difference, so that every step weighs the same (a control)",
    )
    clip: float = Field(1e-4, gt=0.0, lt=1.0, description="Of the ratio to the behaviour, with the pg estimators")

    @property
    def descends(self) -> str:
        return "reverse_kl"

    @property
    def unbiased(self) -> bool:
        return self.estimator != "pg_detached" and self.scale == "kl"

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        assert isinstance(student, Gaussian)
        own = student.detach()
        log_q = student.log_prob(trajectories.actions)
        live = weights != 0
        value = torch.zeros_like(own.std)
        moving, gap = torch.zeros_like(value), torch.zeros_like(value)
        for target in targets:
            teacher = target.distribution
            assert isinstance(teacher, Gaussian)
            factor = self._factor(own) * target.weight
            apart = student.kl(teacher)
            kl = factor * apart
            gap = torch.maximum(gap, apart.detach() * (factor != 0))
            value = value + kl.detach()
            if self.estimator == "kl_direct":
                moving = moving + kl
                continue
            if self.estimator == "pg_sample":
                # Summed over the numbers of a latent while the ratio is their geometric mean: with means in both the
                # expected gradient would be too small by their count.
                numbers = own.mean[0].numel()
                reward = (
                    factor * numbers * (teacher.log_prob(trajectories.actions) - own.log_prob(trajectories.actions))
                )
            else:
                reward = -kl.detach()
            _, coefficient = clipped(
                log_q.detach(), trajectories.behaviour_log_probs, reward, 1 - self.clip, 1 + self.clip
            )
            moving = moving + coefficient * log_q
        value = value.where(live, 0.0)
        # The value is that of the KL under every estimator; the gradient is the estimator's.
        kept, moves = weights * value, weights * (moving - moving.detach())
        each = sums_by_trajectory(kept + moves, trajectories.lengths) if per_example else None
        measured, log_q = self._by_step(value, trajectories), log_q.detach().where(live, 0.0)
        return Loss(kept.sum() + moves.sum(), value, log_q, each, measured, gap=gap.where(live, 0.0))

    def _factor(self, own: Gaussian) -> torch.Tensor:
        """`[N]`, what the divergence of each position is multiplied by."""
        if self.scale == "release":
            return own.step
        return 2 * (own.std / own.gain).square() if self.scale == "uniform" else torch.ones_like(own.std)

    def _by_step(self, value: torch.Tensor, trajectories: Trajectories) -> dict[str, torch.Tensor]:
        """The value where a position is the K-th denoising step of its trajectory, else NaN. A trajectory of one
        position is a latent at a random time, which is no step of a grid."""
        lengths = trajectories.lengths
        steps = int(lengths.max())
        place = torch.cat([torch.arange(n) if n > 1 else torch.tensor([steps]) for n in lengths.tolist()])
        place = place.to(value.device)
        suffix = "" if self.teacher is None else f"@{self.teacher}"
        return {f"kl_step_{k}{suffix}": value.where(place == k, torch.nan) for k in range(steps if steps > 1 else 0)}

    def check_trajectories(self, rollout: Writing) -> None:
        if self.estimator != "kl_direct" and (rollout.learners != {"student"} or not rollout.current):
            raise IncompatibleError(
                f"objective 'gaussian_kl' with estimator {self.estimator!r} needs the student's own samples: on others "
                "its expectation is not what it says. Take rollout: sde without a teacher, or estimator: kl_direct"
            )
