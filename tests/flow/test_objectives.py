"""Objectives on Gaussians."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.distributions import Gaussian
from opd.divergences import Target
from opd.divergences.gaussian_kl import GaussianKL
from opd.objectives.grpo import GRPO
from opd.objectives.sft import SFT
from tests.flow.tiny import step_of, walk


@pytest.mark.parametrize("estimator", ["kl_direct", "pg_sample", "pg_detached"])
@pytest.mark.parametrize("scale", ["kl", "release", "uniform"])
def test_a_student_that_is_its_teacher_has_neither_loss_nor_gradient(estimator, scale):
    v = torch.randn(6, 1, 2, 2, requires_grad=True)
    made = walk(2, 3)
    own = step_of(v, torch.randn(6, 1, 2, 2))
    loss = GaussianKL(estimator=estimator, scale=scale)(own, [Target(own.detach())], torch.ones(6), made)
    loss.total.backward()
    assert loss.total.item() == 0
    assert v.grad.abs().max() == 0


def test_scales_are_the_step_in_time_and_the_plain_square_of_velocities():
    x, v, w = (torch.randn(6, 1, 2, 2) for _ in range(3))
    mine, theirs = step_of(v, x), step_of(w, x)
    values = {
        scale: GaussianKL(scale=scale)(mine, [Target(theirs)], torch.ones(6), walk(2, 3)).values
        for scale in ("kl", "release", "uniform")
    }
    torch.testing.assert_close(values["release"], 0.2 * values["kl"])
    torch.testing.assert_close(values["uniform"], (v - w).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_divergence_by_step_is_logged_with_the_name_of_a_teacher():
    mine, theirs = (step_of(torch.randn(6, 1, 2, 2), torch.zeros(6, 1, 2, 2)) for _ in range(2))
    loss = GaussianKL(teacher="anchor")(mine, [Target(theirs)], torch.ones(6), walk(2, 3))
    assert list(loss.measured) == ["kl_step_0@anchor", "kl_step_1@anchor", "kl_step_2@anchor"]
    second = loss.measured["kl_step_1@anchor"].nanmean()
    torch.testing.assert_close(second, loss.values[1::3].mean())


def test_divergence_by_step_of_trajectories_of_several_lengths():
    """Three steps, one latent at a random time, two steps: the latent is no step."""
    mine, theirs = (step_of(torch.randn(6, 1, 2, 2), torch.zeros(6, 1, 2, 2)) for _ in range(2))
    made = replace(walk(2, 3), lengths=torch.tensor([3, 1, 2]))
    loss = GaussianKL()(mine, [Target(theirs)], torch.ones(6), made)
    places = {name: (~values.isnan()).nonzero().flatten().tolist() for name, values in loss.measured.items()}
    assert places == {"kl_step_0": [0, 4], "kl_step_1": [1, 5], "kl_step_2": [2]}
    assert torch.equal(loss.measured["kl_step_0"][[0, 4]], loss.values[[0, 4]])
    single = GaussianKL()(mine, [Target(theirs)], torch.ones(6), replace(walk(2, 3), lengths=torch.ones(6).long()))
    assert not single.measured


@pytest.mark.parametrize(
    "objective", [GaussianKL(), GaussianKL(estimator="pg_sample"), SFT(), GRPO(clip=0.2)], ids=lambda o: o.kind
)
def test_losses_of_single_trajectories_are_those_of_each_alone(objective):
    v, x = torch.randn(6, 1, 2, 2, requires_grad=True), torch.randn(6, 1, 2, 2)
    made, teacher = walk(2, 3, rewards=[0.0, 1.0], group=2), step_of(torch.randn(6, 1, 2, 2), x)
    own, weights = step_of(v, x), torch.rand(6)
    loss = objective(own, [Target(teacher)], weights, made, per_example=True)
    assert loss.per_example.shape == (2,)
    torch.testing.assert_close(loss.per_example.sum(), loss.total)
    whole = objective(own, [Target(teacher)], weights, made)
    assert whole.per_example is None
    assert torch.equal(whole.total, loss.total)
    for i in range(2):
        micro, here = made.rows(i, i + 1)
        alone = objective(step_of(v[here], x[here]), [Target(teacher.select(here))], weights[here], micro).total
        torch.testing.assert_close(loss.per_example[i], alone)
        (mine,) = torch.autograd.grad(loss.per_example[i], v, retain_graph=True)
        torch.testing.assert_close(mine, torch.autograd.grad(alone, v)[0])


def test_with_an_anchor_the_optimum_lies_between_the_two_teachers():
    x, taught, anchored = (torch.randn(6, 1, 2, 2) for _ in range(3))
    share = 0.25
    best = ((taught + share * anchored) / (1 + share)).requires_grad_()
    own, made = step_of(best, x), walk(2, 3)
    targets = [Target(step_of(taught, x), teacher="expert"), Target(step_of(anchored, x), teacher="anchor")]
    total = torch.zeros(())
    for name, weight in (("expert", 1.0), ("anchor", share)):
        objective = GaussianKL(teacher=name)
        total = total + objective(own, objective.heard(targets), weight * torch.ones(6), made).total
    total.backward()
    assert total.item() > 0.1
    assert best.grad.abs().max() < 1e-5


def test_grpo_of_images_divides_by_the_spread_of_all_rewards_and_bounds():
    made = walk(4, 2, rewards=[1.0, 0.0, 0.5, 0.5], group=2)
    spread = float(torch.tensor([1.0, 0.0, 0.5, 0.5]).std(correction=0)) + 1e-4
    found = GRPO(spread="batch").advantages(made)
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5, 0.0, 0.0]) / spread)
    assert GRPO(spread="batch", bound=1.0).advantages(made).tolist() == [1.0, -1.0, 0.0, 0.0]


def test_grpo_of_images_is_the_policy_gradient_of_the_latents_drawn():
    v = torch.randn(8, 1, 2, 2, requires_grad=True)
    made = walk(4, 2, rewards=[1.0, 0.0, 0.5, 0.5], group=2)
    own = step_of(v, torch.randn(8, 1, 2, 2))
    made = replace(made, behaviour_log_probs=own.log_prob(made.actions).detach())
    GRPO(spread="batch", clip=1e-4)(own, [], torch.ones(8), made).total.backward()
    other = v.detach().clone().requires_grad_()
    x = own.mean.detach() + v.detach() * own.gain.view(-1, 1, 1, 1)  # undo the step
    again = Gaussian(x - other * own.gain.view(-1, 1, 1, 1), own.std, own.step, own.gain)
    advantage = GRPO(spread="batch").advantages(made).repeat_interleave(2)
    (-advantage * again.log_prob(made.actions)).sum().backward()
    torch.testing.assert_close(v.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_a_group_of_equal_rewards_is_distilled_like_any_other():
    x, v, w = (torch.randn(12, 1, 2, 2) for _ in range(3))
    one, same = walk(4, 3, rewards=[0.0, 1.0, 0.5, 0.5], group=2), walk(4, 3, rewards=[1.0] * 4, group=2)
    losses = [GaussianKL()(step_of(v, x), [Target(step_of(w, x))], torch.ones(12), made) for made in (one, same)]
    assert torch.equal(losses[0].values, losses[1].values)
    assert (losses[1].values > 0).all()


@pytest.mark.parametrize("estimator", ["pg_sample", "pg_detached"])
def test_policy_gradients_of_the_divergence_clip_latents_that_another_student_drew(estimator):
    """Where the ratio has left the clip on the side that the reward pulls to, a latent has no gradient."""
    made, x = walk(1, 4), torch.randn(4, 1, 2, 2)
    velocity = torch.randn(4, 1, 2, 2, requires_grad=True)
    own, teacher = step_of(velocity, x), step_of(torch.randn(4, 1, 2, 2), x)
    actions = made.actions
    log_q = own.log_prob(actions).detach()
    reward = teacher.log_prob(actions) - log_q if estimator == "pg_sample" else -own.kl(teacher).detach()
    away = 0.1 * reward.sign()  # two of the latents are likelier now than when drawn, two less likely
    away[2:] *= -1
    stale = replace(made, behaviour_log_probs=log_q - away)
    loss = GaussianKL(estimator=estimator)(own, [Target(teacher)], torch.ones(4), stale)
    (found,) = torch.autograd.grad(loss.total, velocity)
    moved = found.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == [False, False, True, True]
    scale = reward[2:] * (4 if estimator == "pg_sample" else 1) * (-away[2:].abs() * reward[2:].sign()).exp()
    (plain,) = torch.autograd.grad((-scale * step_of(velocity, x).log_prob(actions)[2:]).sum(), velocity)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
