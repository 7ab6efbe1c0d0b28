"""Block drafting: all slots of a block at once, from one pass over mask tokens beside the target's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import Linear, RMSNorm

from opd.distributions import Head
from opd.drafting.base import Drafter, DrafterSettings, Embed, Follow, Outline, Pair, check_taps
from opd.drafting.layers import FeedForward, in_heads, of_blocks, rotate
from opd.drafting.structure import check_structure
from opd.errors import ModelError


class Block(DrafterSettings):
    """DFlash: the anchor's embedding and mask tokens pass together through a few non-causal layers, whose keys and
    values hold the target's features besides; slot k then proposes the token at its own place (z-lab/dflash)."""

    kind: Literal["block"] = "block"
    architecture: ClassVar[str] = "DFlashDraftModel"
    mask_token: int = Field(ge=0, description="An id that no text has; its embedding stands at the slots")
    layers: int = Field(5, ge=1, le=100, description="Of the drafter")
    taps: list[int] = Field(
        [], description="0-based layers of the target whose outputs it reads; default as many as it has, evenly spread"
    )
    block: int = Field(16, ge=2, le=256, description="Slots, the anchor's among them: it proposes one token fewer")
    mlp: int | None = Field(None, ge=1, description="Width within its feed-forward parts; default the target's")

    def build(self, target: Outline, head: Head) -> BlockDrafter:
        if self.mask_token >= target.vocabulary:
            raise ModelError(
                f"student.drafter.mask_token is {self.mask_token}, and the target's ids end at {target.vocabulary - 1}"
            )
        taps = check_taps(self.taps, target, _spread(target.layers, self.layers))
        return BlockDrafter(target, taps, self.layers, self.block, self.mask_token, self.mlp or target.mlp)

    @classmethod
    def of_config(cls, config: dict[str, Any], weights: Mapping[str, torch.Tensor], target: Outline) -> Block:
        made_for = (config.get("hidden_size"), config.get("num_target_layers"))
        if made_for != (target.width, target.layers):
            raise ModelError(
                f"the drafter is for a target of width {made_for[0]} with {made_for[1]} layers, and this target has "
                f"width {target.width} and {target.layers} layers"
            )
        check_structure(config, target)
        own = config["dflash_config"]
        return cls(
            mask_token=own["mask_token_id"],
            layers=config["num_hidden_layers"],
            taps=own["target_layer_ids"],
            block=config["block_size"],
            mlp=config["intermediate_size"],
        )


def _spread(of_target: int, count: int) -> tuple[int, ...]:
    if count == 1:
        return (of_target // 2,)
    return tuple(round(1 + i * (of_target - 4) / (count - 1)) for i in range(count))


class _Attention(torch.nn.Module):
    def __init__(self, target: Outline):
        super().__init__()
        width, d = target.width, target.head_dim
        self.q_proj = Linear(width, target.heads * d, bias=False)
        self.k_proj = Linear(width, target.key_heads * d, bias=False)
        self.v_proj = Linear(width, target.key_heads * d, bias=False)
        self.o_proj = Linear(target.heads * d, width, bias=False)
        self.q_norm = RMSNorm(d, target.eps)
        self.k_norm = RMSNorm(d, target.eps)


class _Layer(torch.nn.Module):
    def __init__(self, target: Outline, mlp: int):
        super().__init__()
        self.input_layernorm = RMSNorm(target.width, target.eps)
        self.self_attn = _Attention(target)
        self.post_attention_layernorm = RMSNorm(target.width, target.eps)
        self.mlp = FeedForward(target.width, mlp)


class BlockDrafter(Drafter):
    """The built form. The features, fused and normed once, give keys and values to every layer; queries come from the
    block alone, and all of its slots see each other."""

    parallel: ClassVar[bool] = True

    def __init__(self, target: Outline, taps: tuple[int, ...], layers: int, block: int, mask_token: int, mlp: int):
        super().__init__()
        self.target, self.taps, self.mask_token = target, taps, mask_token
        self.proposals = self.most = block - 1
        self.fc = Linear(len(taps) * target.width, target.width, bias=False)
        self.hidden_norm = RMSNorm(target.width, target.eps)
        self.layers = torch.nn.ModuleList(_Layer(target, mlp) for _ in range(layers))
        self.norm = RMSNorm(target.width, target.eps)

    @property
    def stack(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def own_head(self) -> None:
        return None

    def read(
        self, features: torch.Tensor, following: torch.Tensor, positions: torch.Tensor, embed: Embed
    ) -> list[Pair]:
        context = self.hidden_norm(self.fc(features))
        return [self._keys_and_values(layer, context, positions) for layer in self.stack]

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
        rows, blocks = anchors.shape
        masks = torch.full((rows, blocks, proposals), self.mask_token, device=tokens.device)
        hidden = embed(torch.cat([tokens[:, :, None], masks], 2)).to(before.dtype)
        places = (anchors[:, :, None] + torch.arange(proposals + 1, device=anchors.device)).flatten(1)
        for layer, context in zip(self.stack, kept, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden).flatten(1, 2)
            query = attention.q_norm(in_heads(attention.q_proj(normed), self.target.heads))
            query = rotate(query, places, self.target.theta).unflatten(2, (blocks, -1))
            keys, values = (x.unflatten(2, (blocks, -1)) for x in self._keys_and_values(layer, normed, places))
            hidden = hidden + attention.o_proj(of_blocks(query, context, (keys, values), anchors))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        found: torch.Tensor = self.norm(hidden)[:, :, 1:]
        for k in range(1, proposals + 1):
            follow(k, found[:, :, k - 1])
        return found

    def _keys_and_values(self, layer: _Layer, states: torch.Tensor, positions: torch.Tensor) -> Pair:
        attention, heads = layer.self_attn, self.target.key_heads
        keys = attention.k_norm(in_heads(attention.k_proj(states), heads))
        return rotate(keys, positions, self.target.theta), in_heads(attention.v_proj(states), heads)

    def config(self) -> dict[str, Any]:
        target, count = self.target, len(self.stack)
        return {
            "architectures": [Block.architecture],
            "model_type": "qwen3",
            "num_hidden_layers": count,
            "hidden_size": target.width,
            "intermediate_size": self.stack[0].mlp.up_proj.out_features,
            "num_attention_heads": target.heads,
            "num_key_value_heads": target.key_heads,
            "head_dim": target.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": target.eps,
            "rope_theta": target.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": target.theta},
            "max_position_embeddings": target.positions,
            "vocab_size": target.vocabulary,
            "block_size": self.proposals + 1,
            "num_target_layers": target.layers,
            "layer_types": ["full_attention"] * count,
            "sliding_window": None,
            "attention_bias": False,
            "dflash_config": {"mask_token_id": self.mask_token, "target_layer_ids": list(self.taps)},
            "tie_word_embeddings": False,
        }
