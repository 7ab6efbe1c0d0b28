"""A loss function as the table of objectives measures it, and what it must reach there."""

from __future__ import annotations

import torch

from opd.truth_table import Gradients, Scene

COSINE, BIAS = 0.999, 1e-3


def from_loss(loss: object) -> Gradients:
    """Gradients of a control `loss(log_p, log_q, actions) -> [Y, L]`, which is differentiated by autograd."""

    def gradients(scene: Scene) -> torch.Tensor:
        rows = []
        for y in range(len(scene.actions)):
            z = scene.student.clone().requires_grad_()
            log_q = torch.log_softmax(z, -1)[scene.states[y]]
            log_p = torch.log_softmax(scene.teacher, -1)[scene.states[y]]
            value = loss(log_p, log_q, scene.actions[y]).sum()  # type: ignore[operator]
            rows.append(torch.autograd.grad(value, z)[0])
        return torch.stack(rows)

    return gradients
