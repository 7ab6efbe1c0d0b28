"""Trajectories sampled from a flow model in this process: the SDE that training learns on, and the ODE for images."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from opd.choice import Settings
from opd.context import Context
from opd.distributions.transition import transition
from opd.errors import IncompatibleError
from opd.flow.denoising import Denoising, pack
from opd.flow.encoder import Condition
from opd.flow.guidance import guidance_of
from opd.flow.model import FlowModel
from opd.rollouts.base import HeldOutSampler, PrefixSource, row_seed
from opd.rollouts.request import Request
from opd.trajectories import Author, Trajectories

if TYPE_CHECKING:
    from opd.policies import Student


class GridSettings(Settings):
    """The steps of a sampler, and which of them are trained on."""

    steps: int = Field(10, ge=2, description="T, of the scheduler's grid of times")
    noise: float = Field(0.7, gt=0.0, description="Level of the SDE")
    trained: float = Field(0.99, gt=0.0, le=1.0, description="The first int(trained * steps) are trained on")

    @property
    def trained_steps(self) -> int:
        """K, how many of the T steps a trajectory holds."""
        return max(1, int(self.trained * self.steps))


class SamplerSettings(GridSettings):
    """How images are drawn."""

    batch: int = Field(64, ge=1, description="Trajectories sampled side by side")
    dtype: Literal["own", "bfloat16"] = Field(
        "own",
        description="own: as the writer computes elsewhere, in its weights' dtype, or a student that is trained with "
        "hardware.precision bf16 in bfloat16 by autocast; bfloat16: by autocast in any case",
    )


class FlowRollout(PrefixSource[SamplerSettings]):
    """Rollouts of one flow model.

    Args:
        model: the one that writes.
        reader: the student's, whose encoding of a prompt the trajectories carry.
        author: who the writer is to the student.
    """

    def __init__(
        self,
        model: FlowModel,
        settings: SamplerSettings,
        *,
        reader: FlowModel | None = None,
        author: Author = "student",
    ):
        self.model, self.reader, self.author = model, reader or model, author
        self.authors = frozenset({author})
        self.dtype = torch.bfloat16 if settings.dtype == "bfloat16" else next(model.parameters()).dtype

    def exact(self, settings: SamplerSettings) -> bool:
        return self.author == "student"

    def held_out(self, settings: SamplerSettings, context: Context, student: Student) -> HeldOutSampler:
        """The student by the settings of this rollout, whoever denoises in it."""
        mine = self if self.author == "student" else student.own_sampler(context).source
        return HeldOutSampler(mine, settings, context)

    @torch.no_grad()
    def __call__(self, request: Request[SamplerSettings]) -> Trajectories:
        if request.begun is not None:
            raise IncompatibleError("rollout 'sde' begins with noise and cannot go on what another source began")
        prompts, group, size = request.prompts, request.group, request.settings.batch
        texts = [str(prompt.view()) for prompt in prompts]
        conditions = [c for c in self.reader.encoder.encode(texts) for _ in range(group)]
        seeds = [row_seed(request.context.seed, request.stream, p, group, g) for p in prompts for g in range(group)]
        rows: list[Denoising] = []
        actions, log_probs = [], []
        training = self.model.training
        self.model.eval()
        try:
            for first in range(0, len(seeds), size):
                part = slice(first, first + size)
                drawn, taken, density = self._sample(request, conditions[part], seeds[part])
                rows += drawn
                actions.append(taken)
                log_probs.append(density)
        finally:
            self.model.train(training)
        return pack(prompts, group, rows, torch.cat(actions), torch.cat(log_probs), self.author)

    def _sample(
        self, request: Request[SamplerSettings], conditions: Sequence[Condition], seeds: Sequence[int]
    ) -> tuple[list[Denoising], torch.Tensor, torch.Tensor]:
        """Trajectories of B rows of a request, their first `budget` actions `[B, K, C, H, W]` and log-densities
        `[B, K]`."""
        device, count, steps = self.model.device, len(seeds), request.settings.steps
        times, noise, guidance = self.model.grid(steps), request.settings.noise, guidance_of(request.context)
        # A row's noise depends on its own seed alone, and is drawn where every machine draws the same.
        shape = (steps + 1 if noise else 1, *self.model.shape)
        draws = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)
        level = torch.full((count,), noise, device=device)
        x = start = draws[:, 0]
        actions, log_probs = [], []
        for k in range(steps):
            t, following = times[k].expand(count), times[k + 1].expand(count)
            with self._autocast(request.settings):
                velocity = self.model(x, t, conditions, [1] * count, [guidance] * count)
            belief = transition(x, velocity, t, following, level)
            x = belief.mean
            if noise:
                x = x + belief.std.view(-1, 1, 1, 1) * draws[:, k + 1]
            if k < request.budget:
                actions.append(x)
                log_probs.append(belief.log_prob(x))
        kept = times[: len(actions) + 1]
        rows = [Denoising(condition, start[i], kept, noise, guidance, x[i]) for i, condition in enumerate(conditions)]
        return rows, torch.stack(actions, 1), torch.stack(log_probs, 1)

    def _autocast(self, settings: SamplerSettings) -> contextlib.AbstractContextManager[Any]:
        if settings.dtype == "bfloat16":
            return torch.autocast(self.model.device.type, torch.bfloat16)
        return contextlib.nullcontext()
