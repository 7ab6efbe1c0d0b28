"""What the layers of drafters are made of: rotary angles, norms, and attention of blocks to what stands before them."""

from __future__ import annotations

import math

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SCORES = 2**26
"""Attention scores of blocks that are held at once; where there are more, a part of the blocks follows the other."""


def rotate(states: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of `[B, heads, n, d]` at int64 `[B, n]` positions, halves rotated as Llama and Qwen do."""
    half = states.shape[-1] // 2
    scale = theta ** (-torch.arange(half, device=states.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * scale
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def in_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, n, heads * d]` to `[B, heads, n, d]`."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def of_blocks(
    queries: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    anchors: torch.Tensor,
) -> torch.Tensor:
    """Attention of M blocks of n slots: each slot sees what stands before its block's anchor, and the w keys of its own
    block; no other block.

    Args:
        queries: `[B, heads, M, n, d]`.
        context: keys and values `[B, key heads, S, d]` of positions 0 to S - 1.
        own: keys and values `[B, key heads, M, w, d]`.
        anchors: int64 `[B, M]`.

    Returns:
        `[B, M, n, heads * d]`. Of more than `SCORES` scores none stays for the backward pass, which makes them again.
    """
    blocks = queries.shape[2]
    parts = min(blocks, -(-scores_of(queries.shape[:-1], context[0].shape[2] + own[0].shape[3]) // SCORES))
    if parts < 2:
        return _of_some_blocks(queries, context, own, anchors)
    pieces = zip(*(x.tensor_split(parts, 2) for x in (queries, *own)), anchors.tensor_split(parts, 1), strict=True)
    return torch.cat(
        [
            checkpoint(_of_some_blocks, asking, context, (keys, values), places, use_reentrant=False)
            for asking, keys, values, places in pieces
        ],
        1,
    )


def scores_of(queries: torch.Size, keys: int) -> int:
    """How many scores `[B, heads, M, n]` queries have with so many keys each."""
    return math.prod(queries) * keys


def _of_some_blocks(
    queries: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    anchors: torch.Tensor,
) -> torch.Tensor:
    _, heads, blocks, slots, d = queries.shape
    shared = heads // context[0].shape[1]
    keys, values, own_keys, own_values = (
        x.repeat_interleave(shared, dim=1) if shared > 1 else x for x in (*context, *own)
    )
    length = keys.shape[2]
    flat = queries.flatten(2, 3)
    before = (flat @ keys.transpose(2, 3)).unflatten(2, (blocks, slots))
    seen = torch.arange(length, device=queries.device) < anchors[:, :, None]
    before = before.masked_fill(~seen[:, None, :, None], -math.inf)
    inside = queries @ own_keys.transpose(3, 4)
    weights = torch.cat([before, inside], -1).float() / math.sqrt(d)
    weights = weights.softmax(-1).to(values.dtype)
    mixed = (weights[..., :length].flatten(2, 3) @ values).unflatten(2, (blocks, slots))
    mixed = mixed + weights[..., length:] @ own_values
    return mixed.permute(0, 2, 3, 1, 4).flatten(3)


class FeedForward(torch.nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, width: int, between: int):
        super().__init__()
        self.gate_proj = torch.nn.Linear(width, between, bias=False)
        self.up_proj = torch.nn.Linear(width, between, bias=False)
        self.down_proj = torch.nn.Linear(between, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return found
