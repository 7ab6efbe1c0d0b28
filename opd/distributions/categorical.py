"""`Categorical`: final hidden states and the output head. Logits exist only chunk by chunk, inside a divergence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from opd.distributions.base import Distribution
from opd.language.engines.cpu.prepacked import Prepacked, worth_packing

NOWHERE = -1e9
"""Logit of an excluded id: its probability is exactly 0, and `p * log p` too, where minus infinity would give NaN."""


@dataclass(frozen=True)
class Head:
    """An output head: `logits = softcap(scale * (h @ weight.T + bias)) / temperature`, over the first `vocabulary` ids
    without those `excluded`.

    Attributes:
        weight: `[V, D]`, in the model's dtype; tied, untied, frozen, or a LoRA-adapted matrix with its graph.
        bias: `[V]` or None.
        scale: factor on the logits (some architectures divide them by a constant).
        softcap: `c * tanh(logits / c)` when set.
        temperature: softmax temperature, declared once by the recipe for sampling, student and teacher.
        vocabulary: number of leading ids that count; ids beyond it have probability zero on every side.
        excluded: int64 `[E]`, ids before it that do not count either, or None: they keep their places in `[C, V']` with
            probability and gradient zero.
        product: packed copy of the weight that `logits` multiplies by, see `prepacked`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    vocabulary: int | None = None
    excluded: torch.Tensor | None = None
    product: Prepacked | None = None

    @property
    def size(self) -> int:
        """V': the number of ids that this head gives probability to."""
        return self.vocabulary or self.weight.shape[0]

    def masked_weight(self) -> torch.Tensor:
        """`[V', D]` view of the rows that count."""
        return self.weight[: self.size]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits `[C, V']` of hidden states `[C, D]`, temperature applied; differentiable by autograd."""
        hidden = hidden.to(self.weight.dtype)
        raw = (hidden @ self.masked_weight().T if self.product is None else self.product(hidden)).float()
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
        """This head on another device; a packed copy of the weight stays behind."""
        bias, excluded = (None if each is None else each.to(device) for each in (self.bias, self.excluded))
        return replace(self, weight=self.weight.to(device), bias=bias, excluded=excluded, product=None)

    def prepacked(self) -> Head:
        """This head, detached, for many calls of `logits` with few rows each while the weight stays as it is."""
        head, weight = self.detach(), self.masked_weight()
        return replace(head, product=Prepacked(weight)) if worth_packing(weight) else head


@dataclass(frozen=True)
class Categorical(Distribution):
    """Full-vocabulary distributions, held as hidden states `[N, D]` and a `Head`: `2 * D` bytes a position in bf16."""

    kind: ClassVar[str] = "categorical"
    hidden: torch.Tensor
    head: Head

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def select(self, index: slice | torch.Tensor) -> Self:
        return replace(self, hidden=self.hidden[index])

    def detach(self) -> Self:
        return replace(self, hidden=self.hidden.detach(), head=self.head.detach())

    def log_probs(self) -> torch.Tensor:
        """float32 `[N, V']`: every log-probability. For small N only (sampling, reports, tests)."""
        return torch.log_softmax(self.head.logits(self.hidden), dim=-1)
