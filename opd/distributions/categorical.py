"""`Categorical`: final hidden states and the output head. Logits exist only chunk by chunk, inside a divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from opd.distributions.base import Distribution
from opd.distributions.vocabulary import EVERY_ID, Vocabulary
from opd.errors import IncompatibleError

NOWHERE = -1e9
"""Logit of an excluded id: its probability is exactly 0, and `p * log p` too, where minus infinity would give NaN."""


@dataclass(frozen=True)
class Head:
    """An output head: `logits = softcap(scale * (h @ weight.T + bias)) / temperature`, over the ids of a vocabulary.

    Attributes:
        weight: `[V, D]`, in the model's dtype; tied, untied, frozen, or a LoRA-adapted matrix with its graph. Of a
            slice of ids `[S, D]`, their rows alone (see `over`).
        bias: `[V]` or None; of a slice `[S]`.
        scale: factor on the logits (some architectures divide them by a constant).
        softcap: `c * tanh(logits / c)` when set.
        temperature: softmax temperature, declared once by the recipe for sampling, student and teacher.
        vocabulary: which ids count; the others have probability and gradient zero on every side.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    vocabulary: Vocabulary = EVERY_ID

    @property
    def size(self) -> int:
        """V': the number of columns of the logits, an id each."""
        return self.vocabulary.width(self.weight.shape[0])

    @property
    def excluded(self) -> torch.Tensor | None:
        """int64 `[E]`, columns without probability, or None."""
        return self.vocabulary.excluded_on(self.weight.device)

    def over(self, vocabulary: Vocabulary, whose: str = "this head") -> Head:
        """This head over these ids alone. The rows of a slice are gathered here, once; their gradient flows back to
        where they came from.

        Raises:
            IncompatibleError: the head has no row for one of the ids; `whose` names it.
        """
        if vocabulary == self.vocabulary:
            return self
        rows = self.weight.shape[0]
        last = vocabulary.ids[-1] + 1 if vocabulary.ids is not None else vocabulary.size or 0
        if self.vocabulary.ids is not None or last > rows:
            own = f"{self.vocabulary}" if self.vocabulary.ids is not None else f"{rows} ids"
            raise IncompatibleError(
                f"{whose} has {own} and this run's vocabulary is {vocabulary}: student and teachers must have all of it"
            )
        if vocabulary.ids is None:
            return replace(self, vocabulary=vocabulary)
        index = vocabulary.named(torch.arange(len(vocabulary.ids), device=self.weight.device))
        bias = None if self.bias is None else self.bias.index_select(0, index)
        return replace(self, weight=self.weight.index_select(0, index), bias=bias, vocabulary=vocabulary)

    def masked_weight(self) -> torch.Tensor:
        """`[V', D]` view of the rows that have a column."""
        return self.weight[: self.size]

    def logits(
        self, hidden: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """float32 logits `[C, V']` of hidden states `[C, D]`, temperature applied; differentiable by autograd.

        Args:
            product: what computes `hidden @ masked_weight().T`, where that can be done faster than here.
        """
        hidden = hidden.to(self.weight.dtype)
        raw = (hidden @ self.masked_weight().T if product is None else product(hidden)).float()
        if self.bias is not None:
            raw = raw + self.bias[: self.size].float()
        # Nothing is changed by a factor of one, and a copy of [C, V'] at every token is not free.
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        if self.temperature != 1.0:
            raw = raw / self.temperature
        return raw if self.excluded is None else raw.index_fill(-1, self.excluded, NOWHERE)

    def detach(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def to(self, device: torch.device) -> Head:
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)


@dataclass(frozen=True)
class Categorical(Distribution):
    """Distributions over a head's ids, held as hidden states `[N, D]` and the `Head`: `2 * D` bytes a position in
    bf16."""

    kind: ClassVar[str] = "categorical"
    hidden: torch.Tensor
    head: Head

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> Vocabulary:
        return self.head.vocabulary

    def select(self, index: slice | torch.Tensor) -> Self:
        return replace(self, hidden=self.hidden[index])

    def detach(self) -> Self:
        return replace(self, hidden=self.hidden.detach(), head=self.head.detach())

    def log_probs(self) -> torch.Tensor:
        """float32 `[N, V']`: every log-probability, a column each (`Vocabulary.columns` says which). For small N only
        (sampling, reports, tests)."""
        return torch.log_softmax(self.head.logits(self.hidden), dim=-1)
