"""Attention for the meta device: computes nothing and keeps for the backward pass what a fused kernel would keep."""

from __future__ import annotations

import torch
from transformers import AttentionInterface

PLAN_ATTENTION = "opd_plan"


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):  # type: ignore[no-untyped-def]
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1]))
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        raise RuntimeError("the plan runs no backward pass")


def plan_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Output of the shape `[B, T, heads, value width]`; on the CPU keys and values are repeated per query head."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    return _Attend.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLAN_ATTENTION, plan_attention)
