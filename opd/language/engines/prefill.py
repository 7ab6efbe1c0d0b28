"""Passes of a causal model that go through a cache: prompts at its start, tokens behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import DynamicCache

from opd.language.engines.base import EncodedPrompt
from opd.language.engines.cache import RoomyLayer, cache_argument
from opd.language.engines.cpu.packing import can_pack, pack, runs_of_equal
from opd.language.engines.padding import pad
from opd.language.layers import decoder_of

if TYPE_CHECKING:
    from opd.language.engines.in_process import InProcess

WITHOUT_CACHE = ("nemotron_h", "recurrent_gemma")
"""Families that compute something else with a cache: they round their states otherwise, or take padding in."""


def cache_name(model: InProcess) -> str | None:
    """The name under which a model's decoder takes a cache; None where every pass goes from a row's beginning."""
    if not model.caches:
        return None
    body = decoder_of(model.base)
    return None if body.config.model_type in WITHOUT_CACHE else cache_argument(body)


class Begun(NamedTuple):
    """B prompts that went through a cache: the last hidden states `[B, D]`, the left-padded mask `[B, L]`, and the
    position of the first token behind each, int64 `[B, 1]`."""

    hidden: torch.Tensor
    mask: torch.Tensor
    following: torch.Tensor


def prefill(model: InProcess, name: str, contexts: Sequence[EncodedPrompt], cache: DynamicCache) -> Begun:
    """Pass prompts through a model; their keys and values go into the cache."""
    reading = model.read(contexts)
    prompts = reading.ids
    ids, mask = pad(prompts, "left")
    positions, following = reading.padded_positions(mask, "left"), reading.following(mask).to(model.device)
    full = bool(mask.all())
    ids, mask, positions = ids.to(model.device), mask.to(model.device), positions.to(model.device)
    # A layer with a window keeps the end of a packed row, not that of each prompt in it.
    if reading.masked or full or not (keeps_all(cache) and can_pack(model.base)):
        options = {"use_cache": True, name: cache}
        return Begun(reading.through(model, ids, None if full else mask, positions, **options)[:, -1], mask, following)
    # Prompts of unequal length are computed without padding, then their keys and values are moved to the right.
    row = pack(prompts, [prompt[:1] for prompt in prompts], reading.positions([len(p) for p in prompts]))
    row = row.to(model.device)
    hidden = model.packed_body(row, reading.inputs(row.ids), use_cache=True, **{name: cache})
    places = torch.arange(row.ids.shape[1], device=model.device)
    of_group = [torch.cat([places[part] for part in parts]) for parts in row.contexts]
    order = torch.cat(
        [of_group[g] for g, (first, stop) in enumerate(runs_of_equal(prompts)) for _ in range(first, stop)]
    )
    present = mask.bool()
    for layer in cache.layers:
        for part in ("keys", "values"):
            packed = getattr(layer, part)[0]
            moved = packed.new_zeros(len(prompts), mask.shape[1], packed.shape[0], packed.shape[2])
            moved[present] = packed.transpose(0, 1)[order]
            setattr(layer, part, moved.transpose(1, 2).contiguous())
    return Begun(hidden[0, row.scored], mask, following)


def step(
    model: InProcess,
    name: str,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    """Final hidden states `[B, n, D]` of int64 `[B, n]` ids behind what the cache holds.

    Args:
        mask: `[B, L + n]`, what is no padding of the cache and of the ids; or None.
        positions: int64 `[B, n]`.
    """
    hidden: torch.Tensor = model.body(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache}
    ).last_hidden_state
    return hidden


def keeps_all(cache: DynamicCache) -> bool:
    """Whether every layer keeps all tokens, in the order in which they came."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)
