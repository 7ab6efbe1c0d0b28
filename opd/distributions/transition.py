"""One step of the sampler: where it leads from a latent, under an SDE with the marginals of the model's ODE.

Time runs from 1 (noise) to 0 (data): `x_t = (1 - t) data + t noise` and the model gives the velocity `noise - data`.
"""

from __future__ import annotations

import torch

from opd.distributions.gaussian import Gaussian


def diffusion(t: torch.Tensor, following: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`s = noise * sqrt(t / (1 - t))`, `[N]`; at t = 1 the denominator is that of the next time."""
    rest = 1 - torch.where(t > 1 - 1e-6, following, t)
    return noise * (t / rest).sqrt()


def transition(
    x: torch.Tensor, velocity: torch.Tensor, t: torch.Tensor, following: torch.Tensor, noise: torch.Tensor
) -> Gaussian:
    """The next latent's distribution (Flow-GRPO, Liu et al. 2025), in float32.

    Args:
        x, velocity: `[N, ...]`, latent and the model's (guided) velocity there.
        t, following: `[N]`, time of the latent and of the next one, `following < t`.
        noise: `[N]`, level a of the SDE. With 0 the mean is the Euler step of the ODE, and the standard deviation is
            that of a velocity with unit variance, `t - following`: then the negative log-density is half the squared
            error of the velocity, up to a constant.
    """
    x, velocity = x.float(), velocity.float()
    step = t - following
    s = diffusion(t, following, noise)
    drift = s.square() / (2 * t)
    gain = (1 + drift * (1 - t)) * step
    shape = (-1, *(1,) * (x.dim() - 1))
    mean = x * (1 - drift * step).view(shape) - velocity * gain.view(shape)
    return Gaussian(mean, torch.where(noise > 0, s * step.sqrt(), step), step, gain)
