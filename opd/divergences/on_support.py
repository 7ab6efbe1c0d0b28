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
from opd.distributions import Categorical, Distribution, Target, TopK, append_tail
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
    """

    alone: ClassVar[bool] = True
    accepts: ClassVar[tuple[str, ...]] = ("categorical", "top_k")
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
        else:
            value, grad = self._on_ids(chunk, answer)
        return Compared(value, grad, gap=(value.abs() - LEFT_BY_SUMS).clamp_(min=0) / self.curvature)

    def _on_ids(self, chunk: Chunk, answer: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
        """Over K ids and the tail, whose gradient is shared out in proportion to the student's probability; without a
        tail the other ids have none."""
        log_q = chunk.log_q
        if isinstance(answer, Categorical):
            assert self.top_k is not None
            full = chunk.log_p(answer)
            source = log_q if self.support_from == "student" else full
            columns = source.topk(self.top_k, dim=-1).indices
            known = full.gather(1, columns)
        else:
            assert isinstance(answer, TopK)
            known, columns = answer.log_probs.float(), chunk.vocabulary.columns(answer.ids)
        if self.tail == "none":
            own = log_q.gather(1, columns).log_softmax(-1)
            scratch = [torch.empty_like(own) for _ in range(self.buffers)]
            value, own_grad = self.value_and_grad(known.log_softmax(-1), own, scratch)
            return value, log_q.zero_().scatter_(1, columns, own_grad)
        log_p, bucket_q = append_tail(known), append_tail(log_q.gather(1, columns))
        log_tail = bucket_q[:, -1:].clone()
        scratch = [torch.empty_like(bucket_q) for _ in range(self.buffers)]
        value, bucket_grad = self.value_and_grad(log_p, bucket_q, scratch)
        grad = log_q.sub_(log_tail).exp_().mul_(bucket_grad[:, -1:])
        return value, grad.scatter_(1, columns, bucket_grad[:, :-1])
