"""Mixtures of experts for the meta device: nothing is computed, and kept is what the grouped products would keep."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

PLAN_EXPERTS = "opd_plan"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, width):  # type: ignore[no-untyped-def]
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(rows)
        return rows.new_empty(rows.shape[0], width)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        raise RuntimeError("the plan runs no backward pass")


def plan_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Output `[tokens, D]`; each token's state is kept once for each of its experts."""
    chosen = top_k_index.shape[-1]
    up = module.gate_up_proj if module.has_gate else module.up_proj
    rows = hidden_states.repeat_interleave(chosen, 0)
    inner = _Product.apply(rows, up, up.shape[-1] if module.is_transposed else up.shape[-2])
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    rows = _Product.apply(inner, module.down_proj, hidden_states.shape[-1])
    return (rows * top_k_weights.reshape(-1, 1).to(rows.dtype)).view(-1, chosen, rows.shape[-1]).sum(1)


ExpertsInterface.register(PLAN_EXPERTS, plan_experts)
