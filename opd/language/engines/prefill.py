"""Passes of a causal model that go through a cache: prompts at its start, tokens behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from opd.language.engines.base import EncodedPrompt, ids_of
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


def prefill(
    model: InProcess, name: str, contexts: Sequence[EncodedPrompt], cache: DynamicCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden state `[B, D]` and left-padded mask of the prompts; their keys and values go into the cache."""
    prompts = [ids_of(context) for context in contexts]
    ids, mask = pad(prompts, "left")
    ids, mask = ids.to(model.device), mask.to(model.device)
    # A layer with a window keeps the end of a packed row, not that of each prompt in it.
    if not (keeps_all(cache) and can_pack(model.base)) or bool(mask.all()):
        attention = None if bool(mask.all()) else mask
        return step(model, name, ids, attention, (mask.cumsum(-1) - 1).clamp(min=0), cache)[:, -1], mask
    # Prompts of unequal length are computed without padding, then their keys and values are moved to the right.
    row = pack(prompts, [prompt[:1] for prompt in prompts]).to(model.device)
    hidden = model.packed_body(row, use_cache=True, **{name: cache})
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
    return hidden[0, row.scored], mask


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
