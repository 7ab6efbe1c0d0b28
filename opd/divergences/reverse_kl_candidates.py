"""Reverse KL over the student's likeliest ids, as a policy gradient: the reward of Prune-OPD's released code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.choice import kind_of
from opd.distributions import Categorical, Distribution
from opd.divergences.base import LEFT_BY_SUMS, CategoricalDivergence
from opd.errors import IncompatibleError
from opd.operator import Chunk, Compared, Whole
from opd.schedules import OverSteps, extremes


class ReverseKLCandidates(CategoricalDivergence):
    """Every state acts `k` times at once: each of the student's `k` likeliest ids `j` has the reward
    `r_j = q_j / Q * (log p_j - log q_j)`, detached, with `Q` their mass and log-probabilities over the whole
    vocabulary; the gradient is that of `-sum_j r_j log q_j`. There is no tail. As `k` grows to the vocabulary it
    becomes reverse KL's; below that it is another gradient, which also moves the ids that are left out.
    """

    kind: Literal["reverse_kl_candidates"] = "reverse_kl_candidates"
    accepts: ClassVar[tuple[str, ...]] = ("categorical",)
    alternative: ClassVar[str] = (
        "the ids are the student's, and a teacher has to answer for each of them: take reverse_kl with top_k, or a "
        "teacher in this process"
    )
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"k": 4}, {"k": 6})
    k: Annotated[int, OverSteps(ge=1)] = Field(16, description="Candidates of each state; those of the student")

    @property
    def descends(self) -> str:
        return "reverse_kl"

    @property
    def unbiased(self) -> bool:
        """Only over a whole vocabulary."""
        return False

    def check_ids(self, count: int) -> None:
        most = round(extremes(self.k)[1])
        if most > count:
            raise IncompatibleError(
                f"objective {kind_of(self)!r}: k is {most}, and student and teacher have {count} ids in common; set k "
                "to that or less, or take objective: reverse_kl, which compares over all of them"
            )

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        return lambda chunk: chunk.over_targets(partial(self._with_one, chunk))

    def _with_one(self, chunk: Chunk, answer: Distribution) -> Compared:
        assert isinstance(answer, Categorical)
        log_q, log_p = chunk.log_q, chunk.log_p(answer)
        top = log_q.topk(self.k, dim=-1)
        ratio = log_p.gather(1, top.indices) - top.values
        reward = top.values.softmax(-1) * ratio
        value = -reward.sum(-1)
        # What the candidates' log-probabilities take from all logits, which their softmax holds together.
        gradient = log_q.exp_().mul_(-value[:, None])
        gradient.scatter_add_(1, top.indices, -reward)
        gap = (reward.abs().sum(-1) - LEFT_BY_SUMS).clamp_(min=0)
        return Compared(value, gradient, gap=gap)
