"""The sampler's equations on numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from opd.context import Context
from opd.distributions.transition import diffusion, transition
from opd.flow.model import load_flow_model
from opd.policies.flow_transformer import FlowTransformer
from opd.prompts import Prompt
from opd.rollouts.sde import SDERollout
from tests.conftest import writing
from tests.flow.tiny import TIMES, step_of


def test_divergence_of_two_steps_is_the_weighted_square_of_their_velocities_difference():
    g = torch.Generator().manual_seed(0)
    x, v, w = (torch.randn(10, 3, 4, 4, generator=g) for _ in range(3))
    t, following = TIMES[:-1], TIMES[1:]
    noise = torch.full((10,), 0.7)
    s = diffusion(t, following, noise)
    expected = [3.51, 3.44, 2.27, 1.72, 1.36, 1.09, 0.86, 0.65, 0.43, 0.07]
    torch.testing.assert_close(s, torch.tensor(expected), atol=0.03, rtol=0.02)
    step = t - following
    weight = step / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2
    kl = transition(x, v, t, following, noise).kl(transition(x, w, t, following, noise))
    torch.testing.assert_close(kl, weight * (v - w).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    assert weight[-2] == pytest.approx(1.1, rel=0.1)


def test_without_noise_the_mean_is_the_euler_step_and_density_that_of_the_velocity():
    x, v, target = (torch.randn(5, 2, 2) for _ in range(3))
    step = step_of(v, x, noise=0.0)
    torch.testing.assert_close(step.mean, x - 0.2 * v)
    # An action that the velocity `target` would have led to.
    error = (v - target).square().flatten(1).mean(1)
    torch.testing.assert_close(step.square(x - 0.2 * target), error)
    constant = -math.log(0.2) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(step.log_prob(x - 0.2 * target), constant - 0.5 * error)


def test_log_probability_is_the_mean_over_the_numbers_of_a_latent():
    step = step_of(torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    x = torch.randn(3, 2, 4, 4)
    expected = torch.distributions.Normal(step.mean, step.std.view(-1, 1, 1, 1)).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob(x), expected)


def test_sde_and_ode_have_the_same_marginals_on_gaussian_data():
    """Data ~ N(1.5, 0.4^2): the velocity is known, and both samplers must end there."""
    centre, spread, count = 1.5, 0.4, 20_000
    g = torch.Generator().manual_seed(0)

    def velocity(x, t):
        variance = (1 - t) ** 2 * spread**2 + t**2
        centred = x - (1 - t) * centre
        data = centre + (1 - t) * spread**2 / variance * centred
        return t / variance * centred - data

    grid = torch.linspace(1, 0, 201)
    for noise in (0.0, 0.7):
        x = torch.randn(count, 1, generator=g)
        for t, following in itertools.pairwise(grid):
            step = step_of(velocity(x, float(t)), x, float(t), float(following), noise)
            x = step.mean + (step.std[:, None] * torch.randn(x.shape, generator=g) if noise else 0)
        assert float(x.mean()) == pytest.approx(centre, abs=0.02)
        assert float(x.std()) == pytest.approx(spread, abs=0.03)


def test_weights_of_the_steps_on_the_schedulers_own_grid(models):
    """Ten steps at shift 3: what a velocity's error weighs at each."""
    grid = load_flow_model(FlowTransformer(model=models[0]), "cpu").grid(10)
    torch.testing.assert_close(grid, TIMES, atol=1e-3, rtol=0)
    v, w = torch.zeros(10, 1, 2, 2), torch.ones(10, 1, 2, 2)
    t, following, noise = grid[:-1], grid[1:], torch.full((10,), 0.7)
    found = transition(v, v, t, following, noise).kl(transition(v, w, t, following, noise))
    diffusions = [3.51, 3.44, 2.27, 1.72, 1.36, 1.09, 0.86, 0.65, 0.43]
    times = TIMES.tolist()
    expected = [
        (now - later) / 2 * (s * (1 - now) / (2 * now) + 1 / s) ** 2
        for s, (now, later) in zip(diffusions, itertools.pairwise(times), strict=False)
    ]
    assert found[:9].tolist() == pytest.approx(expected, rel=0.04)
    # The last step is not trained on; the one before weighs several hundred times the first.
    assert 600 < found[8] / found[0] < 800


def test_a_step_is_float32_whatever_the_model_computes_in(models):
    student = FlowTransformer(model=models[0], dtype="bfloat16").build(Context(torch.device("cpu")))
    source = writing(SDERollout(steps=4, dtype="bfloat16"), student)
    with torch.autocast("cpu", torch.bfloat16):
        made = source([Prompt("p", {"prompt": "red circle"})], 2, 3, stream=0)
        own = student(made)
    assert {own.mean.dtype, own.std.dtype, made.actions.dtype, made.behaviour_log_probs.dtype} == {torch.float32}
    x, v = (torch.randn(3, 2, 4, 4) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        within = step_of(v.bfloat16(), x)
    assert torch.equal(within.mean, step_of(v.bfloat16().float(), x).mean)
