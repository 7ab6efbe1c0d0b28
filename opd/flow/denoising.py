"""Trajectories of a sampler: what stands in `Trajectories.contexts`, and the states that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd.distributions import Gaussian
from opd.distributions.transition import transition
from opd.flow.encoder import Condition
from opd.prompts import Prompt
from opd.trajectories import AUTHORS, Author, Trajectories


@dataclass(frozen=True)
class Denoising:
    """What a trajectory of K steps holds besides its actions `x_1 .. x_K`.

    Attributes:
        condition: the prompt as the student's encoder reads it.
        start: float32 `[C, H, W]`, x_0.
        times: float32 `[K + 1]`, time of x_0 to x_K.
        noise: level of the SDE that the steps are taken by; 0 for the ODE.
        guidance: scale of classifier-free guidance of the steps; every model that is asked about them takes the same.
        outcome: float32 `[C, H, W]`, the latent at time 0 that the trajectory came to, beyond the steps trained on.
    """

    condition: Condition
    start: torch.Tensor
    times: torch.Tensor
    noise: float
    guidance: float
    outcome: torch.Tensor


def pack(
    prompts: Sequence[Prompt],
    group: int,
    rows: Sequence[Denoising],
    actions: torch.Tensor,
    log_probs: torch.Tensor,
    author: Author,
) -> Trajectories:
    """Trajectories of P prompts from P * group rows with `actions` `[B, K, C, H, W]` and `log_probs` `[B, K]`."""
    count, steps = log_probs.shape
    device = actions.device
    return Trajectories(
        prompts=[p for p in prompts for _ in range(group)],
        contexts=rows,
        actions=actions.flatten(0, 1),
        lengths=torch.full((count,), steps),
        behaviour_log_probs=log_probs.flatten(),
        finished=torch.ones(count, dtype=torch.bool),
        learn=torch.ones(count * steps, dtype=torch.bool, device=device),
        authors=torch.full((count * steps,), AUTHORS.index(author), dtype=torch.uint8, device=device),
        groups=torch.arange(len(prompts)).repeat_interleave(group),
    )


def believe(module: torch.nn.Module, trajectories: Trajectories, conditions: Sequence[Condition]) -> Gaussian:
    """A model's distribution over the next latent at each of the N states, with a graph when gradients are on.

    Args:
        module: a `FlowModel`, wrapped or not.
        conditions: B, one a trajectory.
    """
    states, t, following, noise = [], [], [], []
    for context, actions in zip(trajectories.contexts, trajectories.completions(), strict=True):
        states += [context.start[None], actions[:-1]]
        t.append(context.times[:-1])
        following.append(context.times[1:])
        noise.append(torch.full_like(context.times[1:], context.noise))
    x, at = torch.cat(states), torch.cat(t)
    guidance = [context.guidance for context in trajectories.contexts]
    velocity = module(x, at, conditions, trajectories.lengths.tolist(), guidance)
    return transition(x, velocity, at, torch.cat(following), torch.cat(noise))


def labels(context: Denoising) -> list[str]:
    """What a person calls each step of a trajectory: its time."""
    return [f"t={t:.3f}" for t in context.times[:-1].tolist()]


def digits(values: torch.Tensor) -> list[float]:
    """Numbers for a log: a step's divergence, averaged over pixels, is small, so digits count and not decimals."""
    return [float(f"{value:.5g}") for value in values.tolist()]
