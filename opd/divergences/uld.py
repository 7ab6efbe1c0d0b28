"""Sorted probabilities: a control for teachers of another tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from opd.distributions import Aligned, Categorical, Common, Distribution, compared_in
from opd.divergences.base import LEFT_BY_SUMS, CategoricalDivergence
from opd.errors import IncompatibleError
from opd.operator import Chunk, Compared, Whole


class ULD(CategoricalDivergence):
    """`sum_i |p_(i) - q_(i)|` of both sides' probabilities, each sorted by size and the shorter filled up with zeros:
    the universal logit distillation loss (Boizard et al. 2024, arXiv 2402.12030), at positions that are one token on
    both sides. It does not look which token has a probability, so it is zero for a student that is as sure as the
    teacher of something else. A control, not a method.
    """

    kind: Literal["uld"] = "uld"
    accepts: ClassVar[tuple[str, ...]] = ("categorical", "aligned")
    alternative: ClassVar[str] = "it sorts all of a teacher's probabilities: take a teacher in this process"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    alone: ClassVar[bool] = True

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        p, q = (each.exp().sort(-1, descending=True).values for each in (log_p, log_q))
        width = max(p.shape[-1], q.shape[-1])
        p, q = (torch.nn.functional.pad(each, (0, width - each.shape[-1])) for each in (p, q))
        return (p - q).abs().sum(-1)

    def concerned(self, answer: Distribution) -> torch.Tensor | None:
        return compared_in(answer)

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        return lambda chunk: chunk.over_targets(partial(self._with_one, chunk))

    def _with_one(self, chunk: Chunk, answer: Distribution) -> Compared:
        log_q = chunk.log_q
        if isinstance(answer, Aligned):
            if not bool(answer.compared.all()):
                nothing = torch.zeros(len(answer), device=log_q.device)
                return Compared(nothing, log_q.zero_(), gap=nothing)
            common = answer.here()
            if not isinstance(common, Common):
                raise IncompatibleError(
                    "objective 'uld' sorts all of a teacher's probabilities, and this one told the likeliest alone: "
                    "take answers: exact of `opd serve`, or a teacher in this process"
                )
            p = common.answer.log_probs().exp()
        else:
            assert isinstance(answer, Categorical)
            p = chunk.log_p(answer).exp()
        q = log_q.exp_()
        largest = q.sort(-1, descending=True)
        p = p.sort(-1, descending=True).values
        width = min(p.shape[1], q.shape[1])
        apart = largest.values.clone()
        apart[:, :width] -= p[:, :width]
        value = apart.abs().sum(-1) + p[:, width:].sum(-1)
        # A sorted probability's slope belongs to the id that has that rank.
        slope = torch.zeros_like(q).scatter_(1, largest.indices, apart.sign())
        gradient = q * (slope - torch.linalg.vecdot(q, slope)[:, None])
        return Compared(value, gradient, gap=(value - LEFT_BY_SUMS).clamp(min=0))
