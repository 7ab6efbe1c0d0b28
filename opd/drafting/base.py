"""A draft model: it reads a target's hidden states and proposes the next tokens, a block at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from transformers import PretrainedConfig

from opd.choice import Choice
from opd.distributions import Head
from opd.errors import ModelError

Embed = Callable[[torch.Tensor], torch.Tensor]
"""The target's embedding: int64 `[...]` ids to `[..., D]`, detached."""

Follow = Callable[[int, torch.Tensor], torch.Tensor]
"""`(k, hidden [B, M, D]) -> int64 [B, M]`: the token at slot k, 1 to K, of each block, drawn from that slot's final
hidden states or read from a record. Asked once for every slot, in order."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, `[B, heads, S, d]`."""


@dataclass(frozen=True)
class Outline:
    """What a drafter is made after: the numbers of a target's config.

    Attributes:
        layers: of the target.
        width: D, hidden width of target and drafter.
        vocabulary: V, rows of the target's embedding.
        heads, key_heads, head_dim: of attention.
        mlp: width between the two matrices of a feed-forward part.
        eps: of the norms.
        theta: base of the rotary angles.
        positions: most positions.
    """

    layers: int
    width: int
    vocabulary: int
    heads: int
    key_heads: int
    head_dim: int
    mlp: int
    eps: float
    theta: float
    positions: int

    @staticmethod
    def of(config: PretrainedConfig, which: str) -> Outline:
        """Of a target's config; `which` names it.

        Raises:
            ModelError: the family does not say these numbers.
        """
        text: Any = config.get_text_config(decoder=True)
        try:
            heads = int(text.num_attention_heads)
            rope = getattr(text, "rope_parameters", None) or {}
            return Outline(
                layers=int(text.num_hidden_layers),
                width=int(text.hidden_size),
                vocabulary=int(text.vocab_size),
                heads=heads,
                key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
                head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
                mlp=int(text.intermediate_size),
                eps=float(getattr(text, "rms_norm_eps", 1e-6)),
                theta=float(rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10_000.0),
                positions=int(getattr(text, "max_position_embeddings", None) or 2**15),
            )
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"{which}: the config of the family {config.model_type!r} lacks what a drafter is made after "
                f"({error}); take a target of the Llama or Qwen kind"
            ) from None


class Drafter(torch.nn.Module, ABC):
    """A built draft model of a target with hidden width D. Its parameters bear the names of its native format.

    A block has an anchor, the last token that stands and that the target has not yet read, at position a; slot k, 1 to
    K, proposes the token at a + k. The drafter reads the target's tapped hidden states ("features", `[.., F]`, the
    layers' outputs side by side) at positions before a, and the target's embedding of tokens.

    Attributes:
        taps: 0-based layers of the target whose outputs it reads, ascending.
        proposals: K, as it was made for.
        most: the largest K; None where any will do.
        ids: the ids that it may propose, ascending; None for all of the target's.
    """

    taps: tuple[int, ...]
    proposals: int
    most: int | None = None
    ids: tuple[int, ...] | None = None
    parallel: ClassVar[bool] = False
    """Whether its slots do not see which tokens stand at the others: drawn apart, they would be no coherent block."""

    ships_embedding: ClassVar[bool] = False
    """Whether its native format holds the target's embedding besides."""

    @abstractmethod
    def read(
        self, features: torch.Tensor, following: torch.Tensor, positions: torch.Tensor, embed: Embed
    ) -> list[Pair]:
        """Keys and values of what stands, a pair for each layer: of n positions `[B, heads, n, d]`. What one position
        gives does not depend on the others.

        Args:
            features: `[B, n, F]`, of the target.
            following: int64 `[B, n]`, the token behind each position.
            positions: int64 `[B, n]`, from 0.
        """

    @abstractmethod
    def propose(
        self,
        kept: Sequence[Pair],
        before: torch.Tensor,
        tokens: torch.Tensor,
        anchors: torch.Tensor,
        proposals: int,
        follow: Follow,
        embed: Embed,
    ) -> torch.Tensor:
        """Final hidden states `[B, M, K, D]` of M blocks in each of B rows, ready for the head.

        Args:
            kept: what `read` gave of positions 0 to S - 1; a block sees those before its anchor.
            before: `[B, M, F]`, features of the position before each anchor.
            tokens: int64 `[B, M]`, at the anchors.
            anchors: int64 `[B, M]`, positions, at least 1.
            proposals: K.
            follow: the tokens at the slots.
        """

    def forward(self, blocks: Blocks, embed: Embed) -> torch.Tensor:
        """Final hidden states `[N, D]` at the slots of recorded blocks, with a graph: N = K times their number."""
        width = blocks.features.shape[1]
        positions = torch.arange(width, device=blocks.features.device).expand(len(blocks.features), width)
        features = blocks.features.to(next(self.parameters()).dtype)
        kept = self.read(features, blocks.tokens[:, 1:], positions, embed)
        rows = torch.arange(len(features), device=features.device)[:, None]
        hidden = self.propose(
            kept,
            features[rows, blocks.anchors - 1],
            blocks.tokens[rows, blocks.anchors],
            blocks.anchors,
            blocks.proposals.shape[2],
            lambda k, _: blocks.proposals[:, :, k - 1],
            embed,
        )
        return hidden[blocks.present].flatten(0, 1)

    @abstractmethod
    def own_head(self) -> torch.Tensor | None:
        """`[V_d, D]`, its head over `ids`, or over all; None where it uses the target's."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What `config.json` says of it in its native format, but for dtype."""

    def extras(self) -> dict[str, torch.Tensor]:
        """Tensors that its native format has besides the parameters."""
        return {}


@dataclass(frozen=True)
class Blocks:
    """Recorded blocks of B rows, padded on the right; all positions are counted from a row's first token.

    Attributes:
        features: `[B, S, F]`, of the target at positions 0 to S - 1; zero behind a row's last anchor.
        tokens: int64 `[B, S + 1]`, what stands there.
        anchors: int64 `[B, M]`; 1 where a row has fewer blocks.
        proposals: int64 `[B, M, K]`.
        present: bool `[B, M]`, which blocks there are.
    """

    features: torch.Tensor
    tokens: torch.Tensor
    anchors: torch.Tensor
    proposals: torch.Tensor
    present: torch.Tensor


class DrafterSettings(Choice):
    """Base of the axis: the form of a new drafter."""

    axis: ClassVar[str] = "drafter"
    modality: ClassVar[str | None] = "language"
    architecture: ClassVar[str]
    """What `config.json` of its native format calls it."""

    def settled(self, target: Outline) -> Self:
        """These settings with what a file says in the places of those that name it."""
        return self

    @abstractmethod
    def build(self, target: Outline, head: Head) -> Drafter:
        """A new drafter, with random weights.

        Args:
            head: the target's, over all of its ids.
        """

    @classmethod
    @abstractmethod
    def of_config(cls, config: dict[str, Any], weights: Mapping[str, torch.Tensor], target: Outline) -> DrafterSettings:
        """The settings under which `build` makes the structure that a native `config.json` describes.

        Args:
            weights: what lies beside it.

        Raises:
            ModelError: it was made for another target.
        """


def check_taps(taps: Sequence[int], target: Outline, default: Sequence[int]) -> tuple[int, ...]:
    """The layers to tap: those given, or the default.

    Raises:
        ModelError: a layer that the target has not.
    """
    found = tuple(taps or default)
    wrong = next((tap for tap in found if not 0 <= tap < target.layers), None)
    if wrong is not None or list(found) != sorted(set(found)):
        raise ModelError(
            f"student.drafter.taps is {list(found)}, and the target has layers 0 to {target.layers - 1}: give some of "
            "them, ascending, each once"
            + ("" if taps else f" (the default of this form needs a deeper target than {target.layers} layers)")
        )
    return found
