"""Whether a step has anything to learn: which positions' gradients are more than what rounding leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opd.distributions import Aligned, Categorical, Common, Distribution, Gaussian, Routed
from opd.objectives import Loss, Objective, Target

IN_COMPUTE_DTYPE, IN_FLOAT32 = 4, 32
"""Roundings by which gradients of two passes of one model may differ: of what the model computes in, and of the float32
in which sums over width and vocabulary are made."""

APART = 16
"""Roundings of what a log-probability is computed from, by which that of two passes of one model may differ."""


class Gradients:
    """The size of one micro-batch's gradient at each position, in what the model computed there (hidden state, mean).

    Where student and teacher are the same model, the gradient of a divergence is a difference of equal parts: zero up
    to rounding. Adam would turn that into steps of a whole learning rate, of a direction that the processor chose. The
    size of the parts is that of the gradient of an action's log-probability (for latents: and of the mean over its
    standard deviation); a difference below `4 eps(compute dtype) + 32 eps(float32)` of it may be rounding.

    Clips, clamps, temperatures and weights make small gradients of large differences too. So it is taken for rounding
    only where both sides agree as well: a log-probability is rounded by `r = 16 eps(compute dtype)` of the logits'
    size, which makes a KL of `r^2 / 2`, and what a loss says to be further apart has something to learn.

    Made before the backward pass and read after it.

    Args:
        student: `[N]` distributions with a graph.
        answers: the teachers' for the same positions; the coarsest dtype counts.
        processes: how often the loss was multiplied, for an average over processes.
    """

    def __init__(self, student: Distribution, answers: Sequence[Target], processes: int):
        computed, part, part_in_float32, log_prob, log_prob_in_float32 = _parts(student)
        self.answers = answers
        self.sizes: torch.Tensor | None = None
        self.watched = computed is not None and computed.requires_grad
        if computed is not None and self.watched:
            kind = computed.device.type
            dtypes = {computed.dtype, *(d for target in answers for d in _dtypes(target.distribution))}
            if torch.is_autocast_enabled(kind):
                dtypes.add(torch.get_autocast_dtype(kind))
            coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
            finest = torch.finfo(torch.float32).eps
            self.limit = processes * (IN_COMPUTE_DTYPE * coarsest * part + IN_FLOAT32 * finest * part_in_float32)
            self.agreeing = 0.5 * (APART * coarsest * log_prob + IN_FLOAT32 * finest * log_prob_in_float32).square()
            computed.register_hook(self._take)

    def _take(self, gradient: torch.Tensor) -> None:
        sizes = torch.linalg.vector_norm(gradient.detach().flatten(1).float(), dim=1)
        # Gradients that are made example by example come one by one, each zero at the positions of the others.
        self.sizes = sizes if self.sizes is None else torch.maximum(self.sizes, sizes)

    def above(
        self, objectives: Sequence[Objective], weights: Sequence[torch.Tensor], losses: Sequence[Loss]
    ) -> torch.Tensor:
        """bool `[N]`: positions with something to learn. Of an objective that compares with no teacher every gradient
        but zero counts: its parts are not nearly equal. So does one that is not a number.

        Args:
            weights: float32 `[N]` of each objective, shaping included.
        """
        counted = torch.stack([weight != 0 for weight in weights]).any(0)
        if not self.watched or self.sizes is None:
            # Only the head trains, or the distribution is of another kind: nobody saw the gradient.
            return counted
        allowed = torch.zeros_like(self.sizes)
        alone, apart = torch.zeros_like(counted), torch.zeros_like(counted)
        for objective, weight, loss in zip(objectives, weights, losses, strict=True):
            if not objective.needs_teacher:
                alone |= (weight != 0) if loss.computed is None else loss.computed
                continue
            for target in objective.heard(self.answers):
                allowed += weight.abs() * self.limit * torch.as_tensor(target.weight, device=weight.device).abs()
            apart |= (weight != 0) & (True if loss.gap is None else ~(loss.gap <= self.agreeing))
        return counted & (apart | ~(self.sizes <= allowed.where(~alone, 0.0)))


def _parts(student: Distribution) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model computed; the sizes, each a number or `[N]`, of the gradient's parts that are rounded as the model
    computes and as float32; and those of a log-probability's."""
    if isinstance(student, Categorical):
        head = student.head
        weight = head.masked_weight().detach()
        rows = torch.linalg.vector_norm(weight, dtype=torch.float32) / math.sqrt(head.size)
        size = rows * abs(head.scale) / head.temperature
        # The roundings of D numbers average out in a logit, which grows with the root of D as they do.
        logits = (
            size * torch.linalg.vector_norm(student.hidden.detach().float(), dim=1) / student.hidden.shape[1] ** 0.5
        )
        # A gradient's parts differ by as much as the logits do, and far less where a temperature makes those small.
        return student.hidden, size * logits.clamp(max=1), size, logits, logits
    if isinstance(student, Gaussian):
        mean, std = student.mean.detach().flatten(1), student.std.detach()
        size = 1 / (std * math.sqrt(mean.shape[1]))
        # The mean is the latent, in float32, less the model's velocity, of a size about one, times the gain. Of so many
        # numbers the roundings average out, and half of the allowance is enough.
        gain, rms = student.gain.abs() / std, mean.square().mean(1).sqrt() / std
        return student.mean, size * gain / 2, size * (1 + rms), gain, rms
    none = torch.tensor(0.0)
    return None, none, none, none, none


def _dtypes(answer: Distribution) -> list[torch.dtype]:
    parts = answer.parts if isinstance(answer, Routed) else (answer,)
    common = [part.common.answer for part in parts if isinstance(part, Aligned) and isinstance(part.common, Common)]
    return [part.hidden.dtype for part in (*parts, *common) if isinstance(part, Categorical)]
