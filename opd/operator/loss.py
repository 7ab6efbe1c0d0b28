"""`Loss`: what comes of comparing a student with its targets, or with a reward, at the positions of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Loss:
    """What an objective returns for one micro-batch.

    Attributes:
        total: scalar with a graph, `sum_n weights[n] * values[n]`.
        values: float32 `[N]`, detached: the objective (or its estimate) at each position before `weights`, in nats;
            zero where the weight is zero, since those positions are never computed.
        log_probs: float32 `[N]`, detached: the student's log-probability of each action taken; zero likewise.
        per_example: float32 `[B]` with a graph, each trajectory's part of `total`, when it was asked for.
        measured: float32 `[N]` by name, detached; their means over the positions that the objective counts are
            logged, NaN left out.
        computed: bool `[N]`, where the student was looked at; None where that is wherever the weight is not zero.
        gap: float32 `[N]`, detached: how far student and teachers are apart, in nats of a KL beyond what its own
            arithmetic leaves, before weights of any kind, clips and clamps (`opd.rounding`). NaN, or None for all,
            says nothing of it, and then a position has something to learn.
    """

    total: torch.Tensor
    values: torch.Tensor
    log_probs: torch.Tensor
    per_example: torch.Tensor | None = None
    measured: dict[str, torch.Tensor] = field(default_factory=dict)
    computed: torch.Tensor | None = None
    gap: torch.Tensor | None = None
