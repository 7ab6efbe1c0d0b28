"""What a decoder is given of prompts: ids, what stands in the places of some of them, and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from opd.language.engines.padding import Side, pad

if TYPE_CHECKING:
    from opd.language.engines.in_process import InProcess


class Reading:
    """B prompts of text, as a decoder reads them.

    An engine whose prompts hold more than text has a subclass. In its `ids` what stands in the place of other inputs
    is negative, and equal in two prompts where, and only where, the same is read there: whoever lays out rows may so
    compute once what they share, and `inputs` finds by the id what it stands for.

    Attributes:
        ids: B int64 `[P_i]` on the CPU.
        masked: whether these prompts are read under a mask of the model's own, so that rows can only be padded.
    """

    masked: bool = False

    def __init__(self, ids: Sequence[torch.Tensor]):
        self.ids = [each.cpu() for each in ids]

    def positions(self, lengths: Sequence[int]) -> list[torch.Tensor] | None:
        """Positions of B rows of L_i tokens that begin with the prompts, int64 `[L_i]`, or `[A, L_i]` where a token has
        one on each of A axes; None where they are counted from 0."""
        return None

    def inputs(self, ids: torch.Tensor) -> dict[str, object]:
        """What the decoder is given of int64 `[B, L]` ids of rows that begin with the prompts, on its device."""
        return {"input_ids": ids}

    def through(
        self,
        model: InProcess,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        **options: object,
    ) -> torch.Tensor:
        """Final hidden states `[B, L, D]` of padded rows that begin with the prompts, all on the model's device.

        Args:
            mask: int64 `[B, L]`, or None without padding.
            positions: int64 `[B, L]`, or `[A, B, L]`.
        """
        hidden: torch.Tensor = model.body(
            **self.inputs(ids), attention_mask=mask, position_ids=positions, **options
        ).last_hidden_state
        return hidden

    def padded_positions(self, mask: torch.Tensor, side: Side) -> torch.Tensor:
        """int64 `[B, L]`, or `[A, B, L]`, of rows that were padded to a `mask` `[B, L]` on the CPU."""
        each = self.positions(mask.sum(1).tolist())
        if each is None:
            return (mask.cumsum(-1) - 1).clamp(min=0)
        axes = [pad(list(axis), side)[0] for axis in zip(*(torch.atleast_2d(row) for row in each), strict=True)]
        return torch.stack(axes) if each[0].dim() == 2 else axes[0]

    def following(self, mask: torch.Tensor) -> torch.Tensor:
        """int64 `[B, 1]`, on the CPU: the position of the first token behind each prompt, padded as `mask` says."""
        each = self.positions([len(ids) for ids in self.ids])
        if each is None:
            return mask.sum(-1, keepdim=True)
        return torch.stack([row.max() + 1 for row in each])[:, None]
