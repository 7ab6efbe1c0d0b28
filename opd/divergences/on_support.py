"""Base of divergences of two whole distributions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from opd.choice import kind_of
from opd.distributions import Aligned, Categorical, Common, Distribution, Target, TopK, append_tail, compared_in
from opd.distributions.aligned import NEVER
from opd.divergences.base import LEFT_BY_SUMS, CategoricalDivergence
from opd.errors import IncompatibleError
from opd.operator import Chunk, Compared, Loss, Whole
from opd.schedules import OverSteps, extremes
from opd.trajectories import Trajectories


class OnSupport(CategoricalDivergence):
    """Divergences of two whole distributions: over the vocabulary, or over K ids with the rest as one bucket or
    without it.

    With `tail: none` both sides are renormalised over the K ids. What is descended then is the divergence of the two
    distributions *given* one of these ids, exactly: no term asks for mass on them, and the gradient can point against
    that over the vocabulary.

    A teacher of another tokenizer is compared where both sides have one token, over the tokens that both have with the
    rest of each as the bucket; other positions have no value and no gradient, and `reverse_kl_sampled` with `spans:
    several` reaches them.
    """

    alone: ClassVar[bool] = True
    accepts: ClassVar[tuple[str, ...]] = ("categorical", "top_k", "aligned")
    alternative: ClassVar[str] = "use reverse_kl_sampled, or ask the teacher for its top log-probabilities"

    top_k: Annotated[int, OverSteps(ge=1)] | None = Field(
        None, description="Compare over K ids and the tail; default the vocabulary"
    )
    support_from: Literal["teacher", "student"] = Field("teacher", description="Whose K most likely ids, with top_k")
    tail: Literal["bucket", "none"] = Field(
        "bucket",
        description="What stands for all ids but the K: one bucket, or none, with both sides renormalised over the K",
    )
    clip: Annotated[float, OverSteps(gt=0)] | None = Field(
        None,
        description="Most that a position may contribute, in nats: a larger value is scaled down to it, its "
        "gradient with it; default no bound",
    )

    @field_validator("support_from")
    @classmethod
    def _of_a_support(cls, value: str, info: ValidationInfo) -> str:
        if value == "student" and "top_k" in info.data and info.data["top_k"] is None:
            raise ValueError("without top_k the support is the whole vocabulary; set top_k, or remove the key")
        return value

    @property
    def descends(self) -> str:
        return self.given_ids(super().descends)

    def given_ids(self, name: str) -> str:
        """A divergence's name, with the ids that it is conditioned on where there is no tail."""
        return f"{name} given the {self.top_k or 'K'} ids" if self.tail == "none" else name

    @property
    def curvature(self) -> float:
        """The divergence of two distributions that nearly agree, over their KL."""
        return 1.0

    @property
    def unbiased(self) -> bool:
        """Over K ids, with a tail or without, the gradient is exact for that support, not for the vocabulary; clipped
        positions weigh less."""
        return self.top_k is None and self.clip is None

    @abstractmethod
    def value_and_grad(
        self, log_p: torch.Tensor, log_q: torch.Tensor, scratch: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence and its gradient in the student's logits.

        Args:
            log_p: float32 `[C, S]`, the teacher's normalised log-probabilities on a support of S ids; overwritten.
            log_q: float32 `[C, S]`, the student's; overwritten.
            scratch: `buffers` uninitialised tensors of the same shape.

        Returns:
            `[C]` values in nats and `[C, S]` gradients with respect to logits whose softmax is `exp(log_q)`; the
            gradient may lie in any of the tensors that were passed.
        """

    def __call__(
        self,
        student: Distribution,
        targets: Sequence[Target],
        weights: torch.Tensor,
        trajectories: Trajectories,
        per_example: bool = False,
    ) -> Loss:
        loss = super().__call__(student, targets, weights, trajectories, per_example)
        return loss if self.clip is None else replace(loss, measured={"clipped": (loss.values > self.clip).float()})

    def concerned(self, answer: Distribution) -> torch.Tensor | None:
        return compared_in(answer)

    def check_accepts(self, target: type[Distribution], source: str) -> None:
        super().check_accepts(target, source)
        if self.tail == "none" and self.top_k is None and target.kind != "top_k":
            raise IncompatibleError(
                f"objective {self.model_dump()['kind']!r} with tail: none compares K ids, and {source} answers for "
                "all: set top_k, or remove the key"
            )

    def check_ids(self, count: int) -> None:
        most = None if self.top_k is None else round(extremes(self.top_k)[1])
        if most is not None and most >= count:
            raise IncompatibleError(
                f"objective {kind_of(self)!r}: top_k is {most}, and student and teacher have {count} ids in common; "
                "set top_k below that, or leave it out to compare over all of them"
            )

    def begin(self, whole: Whole) -> Callable[[Chunk], Compared]:
        return self._compare

    def _compare(self, chunk: Chunk) -> Compared:
        compared = chunk.over_targets(partial(self._with_one, chunk))
        if self.clip is None:
            return compared
        return replace(compared, share=float(self.clip) / compared.values.clamp(min=float(self.clip)))

    def _with_one(self, chunk: Chunk, answer: Distribution) -> Compared:
        if isinstance(answer, Categorical) and self.top_k is None:
            value, grad = self.value_and_grad(chunk.log_p(answer), chunk.log_q, chunk.scratch(self.buffers))
        elif isinstance(answer, Aligned) and not bool(answer.compared.all()):
            value, grad = torch.zeros(len(answer), device=chunk.log_q.device), chunk.log_q.zero_()
        else:
            value, grad = self._on_ids(chunk, answer)
        return Compared(value, grad, gap=(value.abs() - LEFT_BY_SUMS).clamp_(min=0) / self.curvature)

    def _on_ids(self, chunk: Chunk, answer: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
        """Over K ids and the tail, whose gradient is shared out in proportion to the student's probability; without a
        tail the other ids have none."""
        log_q = chunk.log_q
        if isinstance(answer, Aligned):
            return self._on_common(chunk, answer)
        if isinstance(answer, Categorical):
            full = chunk.log_p(answer)
            columns = self._likeliest(full, log_q)
            known = full.gather(1, columns)
        else:
            assert isinstance(answer, TopK)
            known, columns = answer.log_probs.float(), chunk.vocabulary.columns(answer.ids)
        return self._over(log_q, known, columns)

    def _likeliest(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        """int64 `[C, K]`: of C rows the places of the `top_k` likeliest, of whom `support_from` says."""
        assert self.top_k is not None
        return (log_q if self.support_from == "student" else log_p).topk(self.top_k, dim=-1).indices

    def _on_common(self, chunk: Chunk, answer: Aligned) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the tokens that two tokenizers have in common and the rest of each, or K of them."""
        common = answer.here()
        known, columns = common.known()
        if not isinstance(common, Common):
            return self._over(chunk.log_q, known, columns, none=known <= NEVER / 2)
        if self.top_k is not None:
            chosen = self._likeliest(known, chunk.log_q.gather(1, columns))
            return self._over(chunk.log_q, known.gather(1, chosen), columns.gather(1, chosen))
        return self._over(chunk.log_q, known, columns, tail=not common.complete)

    def _over(
        self,
        log_q: torch.Tensor,
        known: torch.Tensor,
        columns: torch.Tensor,
        tail: bool = True,
        none: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and gradients of a comparison on the ids in `columns`.

        Args:
            log_q: float32 `[C, V]`, the student's; written over.
            known: float32 `[C, K]`, the teacher's at those ids.
            tail: whether there are other ids than these.
            none: bool `[C, K]`, entries that are none.
        """
        own = log_q.gather(1, columns)
        if none is not None:
            own.masked_fill_(none, NEVER)
        if self.tail == "none" or not tail:
            if self.tail == "none":
                known, own = known.log_softmax(-1), own.log_softmax(-1)
            scratch = [torch.empty_like(own) for _ in range(self.buffers)]
            value, own_grad = self.value_and_grad(known, own, scratch)
            if none is not None:
                own_grad = own_grad.masked_fill(none, 0.0)
                return value, log_q.zero_().scatter_add_(1, columns, own_grad)
            return value, log_q.zero_().scatter_(1, columns, own_grad)
        log_p, bucket_q = append_tail(known), append_tail(own)
        log_tail = bucket_q[:, -1:].clone()
        scratch = [torch.empty_like(bucket_q) for _ in range(self.buffers)]
        value, bucket_grad = self.value_and_grad(log_p, bucket_q, scratch)
        grad = log_q.sub_(log_tail).exp_().mul_(bucket_grad[:, -1:])
        if none is not None:
            # An entry that is none has the column of another id, whose share of the tail stays.
            apart = (bucket_grad[:, :-1] - grad.gather(1, columns)).masked_fill(none, 0.0)
            return value, grad.scatter_add_(1, columns, apart)
        return value, grad.scatter_(1, columns, bucket_grad[:, :-1])
