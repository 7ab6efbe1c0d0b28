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
            size = new + new // 4 + ROOM
            roomy = [x.new_empty(*x.shape[:2], size, x.shape[-1]) for x in (key_states, value_states)]
            if old:
                for buffer, held in zip(roomy, (self.keys, self.values), strict=True):
                    assert held is not None
                    buffer[:, :, :old] = held
            self.room = (roomy[0], roomy[1])
        for buffer, states in zip(self.room, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self.keys, self.values = self.room[0][:, :, :new], self.room[1][:, :, :new]
        self.shown = self.keys
        return self.keys, self.values


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


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model with this config; layers with a sliding window or a state stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
