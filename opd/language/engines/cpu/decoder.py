"""One token of every row through a decoder, without its modules.

Of a small model's decoding step the calls between the matrix products take most of the time. `Decoder` does the same
arithmetic in a third of the calls: projections of the same input are one product, the rotary table is made once, groups
of queries share a key's product. Results differ from the modules' by rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from opd.language.engines.cpu.prepacked import Prepacked, worth_packing

KNOWN = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
"""Layers that are written out here; whatever derives from them may compute something else."""
STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on how long a row has become."""


class Decoder:
    """The layers of a decoder as they are now, for one new token a row on a CPU; without gradient.

    Args:
        body: what `PreTrainedModel.get_decoder` returns; see `known`.
        packed: order large weights for oneDNN, see `opd.language.engines.cpu.prepacked`.
    """

    def __init__(self, body: Any, packed: bool):
        config = body.config
        self.embedding, self.norm, self.rotary = body.embed_tokens.weight, body.norm, body.rotary_emb
        self.layers = [_Layer(layer, config, packed) for layer in body.layers]
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def known(body: Any) -> bool:
        """Whether this decoder is written out here and computes on a CPU in one dtype."""
        layers = list(getattr(body, "layers", []))
        weights = list(body.parameters())
        return (
            bool(layers)
            and all(type(layer) in KNOWN for layer in layers)
            and body.config.hidden_act == "silu"
            and getattr(body.rotary_emb, "rope_type", None) in STATIC
            and all(w.device.type == "cpu" and w.dtype == weights[0].dtype for w in weights)
            and not any(isinstance(w, DTensor) for w in weights)
            # Adapters and quantised layers are modules of other classes.
            and type(body.embed_tokens) is nn.Embedding
            and all(type(part) is nn.Linear for layer in layers for part in _projections(layer))
        )

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Final-normed states `[B, D]` of one more token a row.

        Args:
            ids: int64 `[B]`.
            mask: bool `[B, 1, 1, L]`, what each row sees of the cache and of the token itself; None is all.
            positions: int64 `[B, 1]`.
            cache: of `RoomyLayer`s; the token's keys and values are added.
        """
        x = self.embedding[ids]
        # Padding stands on the left, so no position is further than the cache is long.
        cos, sin = (table[positions] for table in self._angles(cache.get_seq_length() + 1, x))
        for layer, held in zip(self.layers, cache.layers, strict=True):
            x = layer(x, mask, cos, sin, held)
        return _normed(self.norm, x)

    def _angles(self, length: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[L, d]` of at least `length` positions."""
        if self.angles is None or len(self.angles[0]) < length:
            cos, sin = self.rotary(x, torch.arange(length + length // 2 + 64)[None])
            # The first half of a head turns against the second, so half of the sines change sign instead.
            half = sin.shape[-1] // 2
            self.angles = (cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1))
        return self.angles


class _Layer:
    def __init__(self, layer: Any, config: Any, packed: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.size, self.keys = attention.head_dim, config.num_key_value_heads
        self.queries, self.scale = config.num_attention_heads, attention.scaling
        self.query_norm = getattr(attention, "q_norm", None)
        self.key_norm = getattr(attention, "k_norm", None)
        self.qkv = _together([attention.q_proj, attention.k_proj, attention.v_proj], packed)
        self.out = _together([attention.o_proj], packed)
        self.gate_up = _together([mlp.gate_proj, mlp.up_proj], packed)
        self.down = _together([mlp.down_proj], packed)

    def __call__(
        self, x: torch.Tensor, mask: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, held: Any
    ) -> torch.Tensor:
        rows, queries, keys, size = len(x), self.queries, self.keys, self.size
        heads = self.qkv(_normed(self.before_attention, x)).view(rows, queries + 2 * keys, size)
        turned, value = heads[:, : queries + keys], heads[:, queries + keys :]
        if self.query_norm is not None:
            parts = _normed(self.query_norm, turned[:, :queries]), _normed(self.key_norm, turned[:, queries:])
            turned = torch.cat(parts, 1)
        turned = turned * cos + turned.roll(size // 2, -1) * sin
        k, v = held.update(turned[:, queries:, None], value[:, :, None])
        # The queries that share a key stand where the tokens of a sequence would: all see the same.
        q = turned[:, :queries].view(rows, keys, queries // keys, size)
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        x = x + self.out(seen.reshape(rows, queries * size))
        gate, up = self.gate_up(_normed(self.before_mlp, x)).chunk(2, -1)
        return x + self.down(silu(gate) * up)


def _projections(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    of_attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _together(layers: list[nn.Linear], packed: bool) -> Any:
    """A function of an input that all `layers` take, to their outputs side by side."""
    large = packed and all(worth_packing(layer.weight) for layer in layers)
    if large or len(layers) == 1:
        products = [_product(layer.weight, layer.bias, large) for layer in layers]
        return products[0] if len(products) == 1 else lambda x: torch.cat([product(x) for product in products], -1)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    return _product(weight, torch.cat([bias.detach() for bias in biases]) if biases else None, False)


def _product(weight: torch.Tensor, bias: torch.Tensor | None, packed: bool) -> Any:
    return Prepacked(weight, bias) if packed else lambda x: linear(x, weight, bias)
