"""Held-out measurement: what a student makes of prompts that it never trains on. How, is its policy's business."""

from __future__ import annotations

from dataclasses import replace

import torch

from opd.policies.held_out import HeldOut, Moment
from opd.rollouts import HeldOutSampler
from opd.run import Run
from opd.sharding import whole


@torch.no_grad()
def evaluate(run: Run, sampler: HeldOutSampler | None = None) -> HeldOut:
    """What the student's policy measures on the held-out prompts, under the settings of the last step that was taken;
    in eval mode, without gradients, and with averaged weights where the update keeps any.

    Args:
        sampler: who writes, for states of somebody else; default the rollout's held-out sampler.
    """
    training = run.student.module.training
    run.student.module.eval()
    with run.optimiser.averaged(), whole(run.student.module):
        found = run.student.measure(run, moment(run, sampler))
    run.student.module.train(training)
    return replace(found, prompts=len(run.held_out))


def moment(run: Run, sampler: HeldOutSampler | None = None) -> Moment:
    """The last step that was taken, as measurements see it."""
    now = run.at(max(0, run.step - 1))
    recipe = now.recipe
    sampled = sampler or run.sampler(now)
    return Moment(recipe.evaluation, recipe.rollout, recipe.teacher, now.context, sampled, first=run.step == 0)
