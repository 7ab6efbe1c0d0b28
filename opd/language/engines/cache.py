"""A KV cache that grows in place, and what a sampler does with the rows of any cache."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that a buffer has room for beyond a quarter of what it holds."""


class RoomyLayer(DynamicLayer):
    """`DynamicLayer` copies all keys and values for every token; here a token is written behind the last one, into
    buffers with room. What is returned is a view of the part in use."""

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None
        self.shown: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self.keys is not self.shown:  # whoever selects or repeats rows puts other tensors in place of the view
            self.room = None
        if self.room is None or new > self.room[0].shape[-2]:
            roomy = [_roomy(x, len(x), new) for x in (key_states, value_states)]
            if old:
                for buffer, held in zip(roomy, (self.keys, self.values), strict=True):
                    assert held is not None
                    buffer[:, :, :old] = held
            self.room = (roomy[0], roomy[1])
        for buffer, states in zip(self.room, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        return self._show(new)

    def join(self, other: RoomyLayer) -> None:
        """Add another layer's rows behind these, all with their last tokens in one column; the other is emptied."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        length = max(self.get_seq_length(), other.get_seq_length())
        self.room = None
        roomy = []
        for first, second in pairs:
            assert first is not None
            assert second is not None
            buffer = _roomy(first, len(first) + len(second), length)
            for rows, held in ((slice(len(first)), first), (slice(len(first), None), second)):
                empty = length - held.shape[2]
                # What is masked must be a number all the same.
                buffer[rows, :, :empty] = 0
                buffer[rows, :, empty:length] = held
            roomy.append(buffer)
        self.room = (roomy[0], roomy[1])
        self._show(length)
        other.reset()
        other.room = other.shown = None

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.room is not None
        self.keys, self.values = self.room[0][:, :, :length], self.room[1][:, :, :length]
        self.shown = self.keys
        return self.keys, self.values


def _roomy(like: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """`[rows, heads, more than length, d]`, of nothing yet."""
    return like.new_empty(rows, like.shape[1], length + length // 4 + ROOM, like.shape[3])


STATES = ("conv_states", "recurrent_states")
"""What a layer with a convolution or a recurrence keeps: tensors by number, one row a sequence."""


def cache_argument(body: torch.nn.Module) -> str | None:
    """The name under which a decoder takes a `transformers.Cache`; None where its family keeps a state of its own."""
    for name in ("cache", "past_key_values", "cache_params"):
        found = inspect.signature(body.forward).parameters.get(name)
        if found is not None:
            kind = found.annotation if isinstance(found.annotation, str) else str(found.annotation)
            return name if "Cache" not in kind or re.search(r"\b(Dynamic)?Cache\b", kind) else None
    return None


def take_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Keep the given rows of every layer, in this order; a row may be taken more than once.

    transformers' own `batch_select_indices` and `batch_repeat_interleave` leave out what `STATES` names.
    """
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if getattr(layer, "keys", None) is not None and layer.is_initialized and layer.keys.numel():
            layer.batch_select_indices(rows)
        for name in STATES:
            held = getattr(layer, name, None)
            if isinstance(held, dict):
                setattr(layer, name, {i: None if x is None else x.index_select(0, rows) for i, x in held.items()})
            elif isinstance(held, torch.Tensor):
                setattr(layer, name, held.index_select(0, rows))


def cut_columns(cache: DynamicCache, columns: int) -> None:
    """Let go of the first columns of layers that keep all tokens."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys[:, :, columns:], layer.values[:, :, columns:]


def join_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Add the rows of another cache behind those of this one. All layers of both keep all tokens; the rows that hold
    fewer get zeros on the left. The other is emptied layer by layer."""
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if isinstance(mine, RoomyLayer) and isinstance(theirs, RoomyLayer) and mine.keys is not None:
            mine.join(theirs)


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model with this config; layers with a sliding window or a state stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
