"""On-policy: the student extends the prompts itself, in this process."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.hardware import fast_in_bf16
from opd.language.sampler import Sampler, Sampling
from opd.prompts import Prompt
from opd.rollouts.base import PrefixSource, Rollout
from opd.trajectories import Trajectories


class StudentRollout(Rollout):
    """Ancestral sampling at the run's temperature. `top_p` and `top_k` cut the distribution that is drawn from; then
    the states are no longer exactly the student's own, while the loss still compares whole distributions."""

    kind: Literal["student"] = "student"
    max_new_tokens: int = Field(256, ge=1)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    batch: int = Field(64, ge=1, description="Rows sampled side by side")
    dtype: Literal["student", "bfloat16", "auto"] = Field(
        "student",
        description="Sample from the student's own weights, or from a bfloat16 copy that is renewed at each rollout; "
        "auto: a copy where the device is fast at it. rollout_gap shows what the copy costs in exactness",
    )
    segment: int | None = Field(None, ge=1, description="Tokens drawn between two looks at the rows; default all")

    @property
    def budget(self) -> int:
        return self.max_new_tokens

    def build(self, context: Context, student: Any) -> LanguageRollout:
        return LanguageRollout(student.language, self, context)


class LanguageRollout(PrefixSource):
    """A built language rollout."""

    def __init__(self, language: Any, settings: StudentRollout, context: Context):
        self.language, self.settings, self.context = language, settings, context
        self.exact = settings.top_p == 1.0 and settings.top_k == 0
        own = next(language.parameters()).dtype
        wanted = settings.dtype == "bfloat16" or (settings.dtype == "auto" and fast_in_bf16(context.device))
        self.copy: Any = None
        if wanted and own != torch.bfloat16:
            self.copy = copy.deepcopy(language).to(torch.bfloat16).requires_grad_(False).eval()
        self.dtype = torch.bfloat16 if self.copy is not None else own

    def sampler(self) -> Sampler:
        """A sampler of the student as it is now."""
        language = self.language
        if self.copy is not None:
            for mine, live in zip(self.copy.parameters(), language.parameters(), strict=True):
                mine.copy_(live)
            language = self.copy
        head = language.head(self.context.temperature, self.context.vocabulary).detach()
        return Sampler(language, head, self.context.end_ids, self.settings.top_p, self.settings.top_k)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], group: int, budget: int, stream: int) -> Trajectories:
        training = self.language.training
        self.language.eval()
        sampler, contexts = self.sampler(), [self.language.encode(p) for p in prompts]
        # Prompts of one length share a batch with little padding; the order of the result is that of the prompts.
        order = sorted(range(len(prompts)), key=lambda i: len(contexts[i]))
        per_wave = max(1, self.settings.batch // group)
        actions: dict[int, tuple[torch.Tensor, torch.Tensor, bool]] = {}
        for first in range(0, len(order), per_wave):
            wave = order[first : first + per_wave]
            seeds = [row_seed(self.context.seed, stream, prompts[i].id, g) for i in wave for g in range(group)]
            state = sampler.start([contexts[i] for i in wave], group, budget, seeds)
            while len(state.alive) and state.drawn < budget:
                sampler.extend(state, self.settings.segment or budget)
            for place, row in enumerate(_rows(state)):
                actions[wave[place // group] * group + place % group] = row
        self.language.train(training)
        return _pack(prompts, contexts, group, actions)


def row_seed(seed: int, stream: int, prompt_id: str, member: int) -> int:
    """63-bit seed of one row, the same whatever batch it is sampled in."""
    text = f"{seed}/{stream}/{prompt_id}/{member}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _rows(state: Sampling) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
    ended = state.finished.tolist()
    return [
        (torch.stack(tokens), torch.stack(log_probs), end)
        for tokens, log_probs, end in zip(state.tokens, state.log_probs, ended, strict=True)
    ]


def _pack(
    prompts: Sequence[Prompt],
    contexts: Sequence[torch.Tensor],
    group: int,
    rows: dict[int, tuple[torch.Tensor, torch.Tensor, bool]],
) -> Trajectories:
    ordered = [rows[i] for i in range(len(rows))]
    actions = torch.cat([tokens for tokens, _, _ in ordered])
    return Trajectories(
        prompts=[p for p in prompts for _ in range(group)],
        contexts=[c for c in contexts for _ in range(group)],
        actions=actions,
        lengths=torch.tensor([len(tokens) for tokens, _, _ in ordered]),
        behaviour_log_probs=torch.cat([log_probs for _, log_probs, _ in ordered]),
        finished=torch.tensor([end for _, _, end in ordered]),
        learn=torch.ones_like(actions, dtype=torch.bool),
        groups=torch.arange(len(prompts)).repeat_interleave(group),
    )
