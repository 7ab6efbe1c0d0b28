"""Held-out measurement: what a student makes of prompts that it never trains on. How, is its policy's business."""

from __future__ import annotations

import torch

from opd.policies.held_out import HeldOut
from opd.run import Run
from opd.sharding import whole


@torch.no_grad()
def evaluate(run: Run) -> HeldOut:
    """What the student's policy measures on the held-out prompts; in eval mode, without gradients, and with averaged
    weights where the update keeps any."""
    training = run.student.module.training
    run.student.module.eval()
    with run.optimiser.averaged(), whole(run.student.module):
        found = run.student.measure(run, run.recipe.evaluation)
    run.student.module.train(training)
    return found
