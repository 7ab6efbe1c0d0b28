"""Scenes of latents: a few states of a flow sampler, where a quadrature is exact for what the gradients are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.polynomial.hermite_e import hermegauss

from opd.distributions import Gaussian, Target
from opd.distributions.transition import transition
from opd.operator import Loss
from opd.prompts import Prompt
from opd.scenes.base import Scene
from opd.trajectories import Trajectories

QUADRATURE, NUMBERS = 4, 2
"""Nodes along each number of a latent, and numbers of a latent."""

TIMES, FOLLOWING, NOISE = (1.0, 0.9, 0.6, 0.3), (0.9, 0.6, 0.3, 0.1), 0.7

Objective = Callable[[Gaussian, list[Target], torch.Tensor, Trajectories], Loss]


@dataclass(frozen=True)
class LatentScene(Scene):
    """A student's and a teacher's velocity, float32 `[4, NUMBERS]`, at latents `x` of the same shape; the draws are the
    Y = QUADRATURE ** NUMBERS nodes of a Gauss-Hermite quadrature, which is exact for polynomials."""

    x: torch.Tensor
    student: torch.Tensor
    teacher: torch.Tensor

    @classmethod
    def random(cls, seed: int) -> LatentScene:
        g = torch.Generator().manual_seed(seed)
        return cls(*(torch.randn(len(TIMES), NUMBERS, generator=g) for _ in range(3)))

    def law(self) -> torch.Tensor:
        weights = hermegauss(QUADRATURE)[1]
        q = torch.tensor([math.prod(each) for each in itertools.product(weights, repeat=NUMBERS)], dtype=torch.float64)
        return q / q.sum()

    def gradients(self, divergence: Objective) -> torch.Tensor:
        """float64 `[Y, 4, NUMBERS]`, in the student's velocity."""
        nodes = hermegauss(QUADRATURE)[0]
        teacher = self._next(self.teacher)
        each = []
        for node in torch.tensor(list(itertools.product(nodes, repeat=NUMBERS)), dtype=torch.float32):
            velocity = self.student.clone().requires_grad_()
            student = self._next(velocity)
            actions = student.mean.detach() + student.std[:, None] * node
            drawn = _drawn(actions, student.log_prob(actions).detach())
            divergence(student, [Target(teacher)], torch.ones(len(TIMES)), drawn).total.backward()
            assert velocity.grad is not None
            each.append(velocity.grad.double())
        return torch.stack(each)

    def promised(self, divergence: object) -> torch.Tensor:
        """float64 `[4, NUMBERS]`, of the KL of the two steps, the one promise there is."""
        velocity = self.student.double().requires_grad_()
        student = self._next(self.student)
        factor = (0.5 * (student.gain / student.std).square()).double()
        exact = (factor * (velocity - self.teacher.double()).square().mean(1)).sum()
        return torch.autograd.grad(exact, velocity)[0]

    def kls(self) -> tuple[torch.Tensor, torch.Tensor]:
        # With one standard deviation for both, the two KLs are one.
        return self.promised(None), self.promised(None)

    def _next(self, velocity: torch.Tensor) -> Gaussian:
        t, following = torch.tensor(TIMES), torch.tensor(FOLLOWING)
        return transition(self.x, velocity, t, following, torch.full_like(t, NOISE))


def _drawn(actions: torch.Tensor, log_probs: torch.Tensor) -> Trajectories:
    """One trajectory of these actions."""
    count = len(actions)
    return Trajectories(
        prompts=[Prompt("scene", {})],
        contexts=[None],
        actions=actions,
        lengths=torch.tensor([count]),
        behaviour_log_probs=log_probs,
        finished=torch.ones(1, dtype=torch.bool),
        learn=torch.ones(count, dtype=torch.bool),
        authors=torch.zeros(count, dtype=torch.uint8),
        groups=torch.zeros(1, dtype=torch.int64),
    )
