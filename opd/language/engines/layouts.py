"""How rows of unequal length share a pass, and the one of them that is a transformers' own: rows one behind the other,
without padding, whose positions begin anew with each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from opd.language.attention import attention_of, meets_in_attention, takes_lengths
from opd.language.engines.cpu.packing import packable
from opd.language.layers import decoder_of

Layout = Literal["auto", "packed", "varlen", "right", "left"]
"""`packed`: one row, what rows share computed once, by our own attention. `varlen`: one row, each row whole, by
transformers' attention. `right`, `left`: a batch padded there. What a model does not know, it does as `auto`."""

TOLD = {
    "packed": "one row without padding, what rows share computed once",
    "varlen": "one row without padding",
    "right": "padded",
}
"""The kinds of `usual_layout` in words."""
WITHOUT_POSITIONS = ("afmoe", "biogpt", "opt")
"""Families that make their mask without positions, and so of one row where several lie behind each other."""


def usual_layout(model: PreTrainedModel, device: str) -> Layout:
    """What `auto` is for a model on a kind of device.

    `varlen` is taken on a CUDA device where the attention is told lengths; others would make a mask of all tokens by
    all tokens.
    """
    if device == "cpu" and packable(model):
        return "packed"
    if device == "cuda" and takes_lengths(attention_of(model)) and can_flatten(model):
        return "varlen"
    return "right"


def can_flatten(model: PreTrainedModel) -> bool:
    """Whether rows one behind the other, with positions that begin anew, get what each gets alone."""
    told = takes_lengths(attention_of(model)) or decoder_of(model).config.model_type not in WITHOUT_POSITIONS
    return told and meets_in_attention(model)


@dataclass(frozen=True)
class FlatRow:
    """B rows one behind the other, L tokens in all.

    Attributes:
        ids: int64 `[1, L]`.
        positions: int64 `[1, L]`, which begin with 0 in each row; where a token has a position on each of A axes
            `[1 + A, 1, L]`, the first of them counted so and the others its own.
        bounds: int32 `[B + 1]`, where each row begins, and L.
        longest: tokens of the longest row.
        scored: int64 `[N]`, places whose hidden state predicts a token of a completion, in order.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    longest: int
    scored: torch.Tensor

    def inputs(self, attention: str, device: torch.device) -> dict[str, torch.Tensor | int | None]:
        """What a decoder takes besides the ids. transformers finds the rows in the positions where there is no mask; an
        attention that takes lengths gets them too, or every layer would look for them and wait for the device."""
        given: dict[str, torch.Tensor | int | None] = {
            "position_ids": self.positions.to(device),
            "attention_mask": None,
        }
        if takes_lengths(attention):
            bounds = self.bounds.to(device)
            given |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            given |= {"max_length_q": self.longest, "max_length_k": self.longest}
        return given


def flatten(
    contexts: Sequence[torch.Tensor],
    completions: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor] | None = None,
) -> FlatRow:
    """Lay out B trajectories on the CPU. The last token of each predicts nothing that is scored, so it is not fed.

    Args:
        positions: of what is fed of each, int64 `[A, L_i]` where a token has one on each of A axes.
    """
    rows = [torch.cat([c.cpu(), y[:-1].cpu()]) for c, y in zip(contexts, completions, strict=True)]
    lengths = [len(row) for row in rows]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    starts = bounds.tolist()
    scored = [
        torch.arange(start + len(context) - 1, start + length)
        for start, context, length in zip(starts, contexts, lengths, strict=False)
    ]
    counted = torch.cat([torch.arange(length) for length in lengths])[None]
    if positions is not None:
        # transformers' decoders with axes find the rows in a first one that counts, and turn by the others.
        counted = torch.cat([counted, torch.cat([torch.atleast_2d(row) for row in positions], -1)])[:, None]
    return FlatRow(
        torch.cat(rows)[None],
        counted,
        bounds.to(torch.int32),
        max(lengths),
        torch.cat(scored),
    )
