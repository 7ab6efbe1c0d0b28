"""Completions sampled from a language model in this process; the student's and the teacher's rollouts share it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from opd.choice import Settings
from opd.context import Context
from opd.errors import RunError
from opd.hardware import fast_in_bf16
from opd.language.layers import decoder_of
from opd.language.own_outputs import TOLERANCE, check_draws, compute_dtype
from opd.language.sampler import Sampler
from opd.prepacked import FEWEST, prepacked
from opd.prompts import Prompt
from opd.rollouts.base import HeldOutSampler, PrefixSource, Rollout, row_seed
from opd.rollouts.request import Request
from opd.schedules import OverSteps
from opd.sharding import whole
from opd.trajectories import AUTHORS, Author, Trajectories

if TYPE_CHECKING:
    from opd.policies import Student


class SamplingSettings(Settings):
    """How completions are drawn."""

    top_p: Annotated[float, OverSteps(gt=0, le=1)] = Field(1.0, description="Keep the most likely tokens of this mass")
    top_k: Annotated[int, OverSteps(ge=0)] = Field(0, description="Keep so many of the most likely tokens; 0 keeps all")
    batch: int = Field(64, ge=1, description="Rows sampled side by side")
    dtype: Literal["own", "bfloat16", "auto"] = Field(
        "own",
        description="Sample from the model's own weights, or from a bfloat16 copy that is renewed at each rollout; "
        "auto: a copy where the device is fast at it. rollout_gap shows what the copy costs in exactness",
    )
    segment: int | None = Field(None, ge=1, description="Tokens drawn between two looks at the rows; default all")


GREEDY = {"top_p": 1.0, "top_k": 1}
"""Cuts that leave the likeliest token alone."""


class LanguageRollout(PrefixSource):
    """Rollouts of one language model.

    Args:
        language: the model that writes.
        reader: the student's, whose encoding of a prompt the trajectories carry.
        author: who the writer is to the student.
        sees: column with the writer's view of a prompt; default the student's.
    """

    def __init__(
        self,
        language: Any,
        settings: SamplingSettings,
        context: Context,
        *,
        reader: Any = None,
        author: Author = "student",
        sees: str | None = None,
    ):
        self.language = language
        self.reader, self.author, self.sees = reader or language, author, sees
        self.authors = frozenset({author})
        own = next(language.parameters()).dtype
        wanted = settings.dtype == "bfloat16" or (settings.dtype == "auto" and fast_in_bf16(context.device))
        self.copy: Any = None
        if wanted and own != torch.bfloat16:
            self.copy = copy.deepcopy(language).to(torch.bfloat16).requires_grad_(False).eval()
        self.dtype = torch.bfloat16 if self.copy is not None else own

    def exact(self, settings: Settings) -> bool:
        assert isinstance(settings, SamplingSettings)
        return settings.top_p == 1.0 and settings.top_k == 0 and self.author == "student"

    def held_out(self, settings: Rollout, context: Context, student: Student) -> HeldOutSampler:
        """This writer itself, where the student is it."""
        if self.author != "student":
            return super().held_out(settings, context, student)
        return HeldOutSampler(self, settings, context)

    def writers(self) -> list[PrefixSource]:
        return [self]

    @torch.no_grad()
    def check_draws(self, prompts: Sequence[Prompt], context: Context) -> None:
        training = self.language.training
        self.language.eval()
        # The student's view of a prompt will do: one of the writer's own may be missing where others write.
        contexts = [self.reader.encode(prompt) for prompt in prompts]
        tolerance = max(TOLERANCE[compute_dtype(self.language)], TOLERANCE[self.dtype])
        check_draws(self.sampler(SamplingSettings(), context), contexts, self.language, f"the {self.author}", tolerance)
        self.language.train(training)

    def sampler(self, settings: SamplingSettings, context: Context, packed: bool = False) -> Sampler:
        """A sampler of the model as it is now, its head `packed` as it is too."""
        language = self.language
        if self.copy is not None:
            for mine, live in zip(self.copy.parameters(), language.parameters(), strict=True):
                mine.copy_(live)
            language = self.copy
        head = language.head(context.temperature, context.vocabulary, context.excluded)
        head = head.prepacked() if packed else head
        return Sampler(language, head, context.end_ids, settings.top_p, settings.top_k, packed)

    @torch.no_grad()
    def __call__(self, request: Request[SamplingSettings]) -> Trajectories:
        with whole(self.language):
            return self._sampled(request)

    def _sampled(self, request: Request[SamplingSettings]) -> Trajectories:
        prompts, group, budget, begun = request.prompts, request.group, request.budget, request.begun
        settings, context = request.settings, request.context
        training = self.language.training
        self.language.eval()
        own = [self.language.encode(p, self.sees) for p in prompts]
        views, members = own, group
        if begun is not None:
            # Every trajectory continues its own beginning, so nothing but the prompt is common to a group.
            views = [torch.cat([views[i // group], start.cpu()]) for i, start in enumerate(begun)]
            members = 1
        # Prompts of one length share a batch with little padding; the order of the result is that of the prompts.
        order = sorted(range(len(views)), key=lambda i: len(views[i]))
        per_wave = max(1, settings.batch // members)
        pays = budget * -(-len(order) // per_wave) >= FEWEST
        sampler = self.sampler(settings, context, pays)
        actions: dict[int, tuple[torch.Tensor, torch.Tensor, bool]] = {}
        unpacked = sampler.decoder is None and pays
        with prepacked(decoder_of(sampler.model.base)) if unpacked else contextlib.nullcontext():
            for first in range(0, len(order), per_wave):
                wave = order[first : first + per_wave]
                rows = [i * members + g for i in wave for g in range(members)]
                seeds = [row_seed(context.seed, request.stream, prompts[r // group], group, r % group) for r in rows]
                state = sampler.start([views[i] for i in wave], members, budget, seeds)
                while len(state.alive) and state.drawn < budget:
                    sampler.extend(state, settings.segment or budget)
                actions |= dict(zip(rows, state.rows(), strict=True))
        self.language.train(training)
        if not all(bool(log_probs.isfinite().all()) for _, log_probs, _ in actions.values()):
            raise RunError(
                f"the {self.author}'s distribution over tokens is not a number: its weights left all bounds. Lower "
                "update.learning_rate, or take hardware.precision: fp32"
            )
        same = self.reader is self.language and self.sees is None
        contexts = own if same else [self.reader.encode(p) for p in prompts]
        return pack_rows(prompts, contexts, group, [actions[i] for i in range(len(actions))], self.author)


def pack_rows(
    prompts: Sequence[Prompt],
    contexts: Sequence[torch.Tensor],
    group: int,
    rows: Sequence[tuple[torch.Tensor, torch.Tensor, bool]],
    author: Author,
) -> Trajectories:
    """Trajectories of P prompts from P * group rows of `(actions, log-probabilities, finished)`."""
    actions = torch.cat([tokens for tokens, _, _ in rows])
    return Trajectories(
        prompts=[p for p in prompts for _ in range(group)],
        contexts=[c for c in contexts for _ in range(group)],
        actions=actions,
        lengths=torch.tensor([len(tokens) for tokens, _, _ in rows]),
        behaviour_log_probs=torch.cat([log_probs for _, log_probs, _ in rows]),
        finished=torch.tensor([end for _, _, end in rows]),
        learn=torch.ones_like(actions, dtype=torch.bool),
        authors=torch.full_like(actions, AUTHORS.index(author), dtype=torch.uint8),
        groups=torch.arange(len(prompts)).repeat_interleave(group),
    )
