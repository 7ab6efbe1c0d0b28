"""What every contestant of a comparison of steps is: a job, a session that steps, and the score of one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.phases import Phases
from benchmarks.sizes import ForcedLengths, Size, end_ids
from opd.sharding import full

LEARNING_RATE = 1e-5
STEPS = 64
"""Steps that there are prompts for; longer runs see them again."""

AfterStep = Callable[[], bool]
"""Called when a step is done; answers whether to go on."""


@dataclass(frozen=True)
class Job:
    """What a contestant is asked to run.

    Attributes:
        precision: `fp32`, or `bf16`: weights in float32, computing under autocast, as both libraries do by default.
        threads: torch's.
        device: where all computes: `cpu` or `cuda`.
        tile: rows of TRL's chunks; None is as shipped.
        changes: makes the contestant one of `opd`, whose recipe has these settings besides.
    """

    contestant: str
    size: Size
    precision: str = "fp32"
    threads: int = 1
    tile: int | None = None
    device: str = "cpu"
    changes: dict[str, Any] | None = None


@dataclass(frozen=True)
class Score:
    """A loss on given completions: its value, the norm of its gradient, and the gradient's component along one random
    direction, which two different gradients of the same norm do not share."""

    loss: float
    gradient_norm: float
    gradient_component: float

    @staticmethod
    def of(loss: torch.Tensor | float, parameters: Iterable[torch.nn.Parameter]) -> Score:
        """What the parameters' gradients are now; a library's parameters come in the order of the model's file."""
        generator = torch.Generator().manual_seed(3)
        square, component = 0.0, 0.0
        for gradient in (full(p.grad) for p in parameters if p.grad is not None):
            square += float(gradient.double().square().sum())
            direction = torch.randn(gradient.shape, generator=generator).to(gradient.device)
            component += float((gradient * direction).double().sum())
        return Score(float(loss), square**0.5, component)


class Session(ABC):
    """A library with models loaded, ready to step.

    Attributes:
        sampled: tokens that the steps since the last look have sampled.
    """

    def __init__(self, job: Job):
        self.job, self.phases, self.sampled = job, Phases(job.device), 0
        self.folder = job.size.folder
        self.ends = end_ids(self.folder / "student")
        self.prompts = job.size.prompts(STEPS)
        self.forced = ForcedLengths.of(job.size.encoded(STEPS), job.size.lengths(STEPS), self.ends)

    @abstractmethod
    def train(self, after_step: AfterStep) -> None:
        """Train until `after_step` says no."""

    @abstractmethod
    def score(self, completions: Sequence[Sequence[int]]) -> Score:
        """The loss of one completion of each of the first step's prompts; gradients are gone afterwards."""

    def examples(self) -> list[list[int]]:
        """Completions of the first step's prompts to score: random ids of the scheduled lengths."""
        generator = torch.Generator().manual_seed(2)
        lengths = self.job.size.lengths(1)
        # The first ids of a vocabulary are special ones; random ids need not be likely ones.
        return [
            [*torch.randint(16, self.job.size.vocabulary, (n - 1,), generator=generator).tolist(), self.ends[0]]
            for n in lengths
        ]
