"""Many trajectories in one row, without padding, and what they share once: a group's prompt, and the beginning that
all prompts have in common (a system prompt, a template).

A row is `[beginning, prompt, y1, y2, ..., prompt', y1', ...]`. Each completion attends to the beginning, its prompt and
itself; nothing attends across. The result equals that of separate padded rows; what is saved is padding and repetition.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from opd.language.attention import meets_in_attention
from opd.language.layers import decoder_of

ATTENTION = "opd_packed"
SHORT = 256
"""Keys up to which attention is computed in float32 whatever the model's dtype: on a CPU its backward pass in bfloat16
takes 2 to 5 times as long for sequences of 64 tokens, as long for 512, and is the faster one from 1024 on."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a row that attend causally to themselves and fully to their parents, in order."""

    start: int
    length: int
    parents: tuple[slice, ...] = ()

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class Layout:
    """Where things lie in a packed row of L tokens.

    Attributes:
        ids: int64 `[1, L]`.
        positions: int64 `[1, L]`, or `[A, 1, L]` with one on each of A axes.
        segments: the row cut into segments, in order.
        contexts: for each distinct context the slices that make it up.
        scored: int64 `[N]`, places in the row whose hidden state predicts the N actions, in packed order.
        masks: attention masks by (tokens before, length, window), shared by all layers.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    contexts: tuple[tuple[slice, ...], ...]
    scored: torch.Tensor
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    read: threading.Event = field(default_factory=threading.Event)
    """Set when an attention got this layout; sharded models hand their layers copies of collections and dataclasses."""

    def to(self, device: torch.device) -> Layout:
        return replace(
            self, ids=self.ids.to(device), positions=self.positions.to(device), scored=self.scored.to(device)
        )


def pack(
    contexts: Sequence[torch.Tensor],
    completions: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor] | None = None,
) -> Layout:
    """Lay out B trajectories; neighbours with the same context share it. The last token of each is not fed.

    Args:
        positions: of what is fed of each, int64 `[L_i]`, or `[A, L_i]` with one on each of A axes; default from 0 on.
    """
    if positions is None:
        positions = [torch.arange(len(c) + len(y) - 1) for c, y in zip(contexts, completions, strict=True)]
    groups = runs_of_equal(contexts)
    beginning = common_beginning([contexts[first].cpu() for first, _ in groups])
    pieces, placed, scored = [contexts[0][:beginning].cpu()], [positions[0][..., :beginning]], []
    shared = (slice(0, beginning),) if beginning else ()
    segments = [Segment(0, beginning)] if beginning else []
    parts: list[tuple[slice, ...]] = []
    place = beginning

    def lay(tokens: torch.Tensor, row: int, after: int) -> int:
        nonlocal place
        pieces.append(tokens)
        placed.append(positions[row][..., after : after + len(tokens)])
        place += len(tokens)
        return place - len(tokens)

    for first, stop in groups:
        prompt = len(contexts[first])
        start = lay(contexts[first][beginning:].cpu(), first, beginning)
        own = slice(start, place)
        parts.append((*shared, own))
        alone = stop - first == 1
        if not alone:
            segments.append(Segment(start, place - start, shared))
        for number in range(first, stop):
            at = lay(completions[number][:-1].cpu(), number, prompt)
            scored += [torch.tensor([own.stop - 1]), torch.arange(at, place)]
            if alone:
                # A lone completion continues its prompt: one causal segment.
                segments.append(Segment(start, place - start, shared))
            elif place > at:
                segments.append(Segment(at, place - at, (*shared, own)))
    where = torch.cat(placed, -1).unsqueeze(-2)
    return Layout(torch.cat(pieces)[None], where, tuple(segments), tuple(parts), torch.cat(scored))


def runs_of_equal(contexts: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """`(first, stop)` of each run of neighbours with the same context."""
    bounds = [0]
    bounds += [i for i in range(1, len(contexts)) if not _same(contexts[i], contexts[i - 1])]
    return list(zip(bounds, [*bounds[1:], len(contexts)], strict=True))


def common_beginning(contexts: Sequence[torch.Tensor]) -> int:
    """Leading tokens that all contexts share, leaving each at least one of its own; 0 for a single context."""
    if len(contexts) < 2:
        return 0
    width = min(len(c) for c in contexts) - 1
    stacked = torch.stack([c[:width] for c in contexts])
    different = (stacked != stacked[:1]).any(0).nonzero()
    return int(different[0]) if len(different) else width


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (len(a) == len(b) and torch.equal(a, b))


def packable(model: PreTrainedModel) -> bool:
    """Whether rows of a transformers model can be packed on a CPU: they meet in its attention alone, and that is what
    torch computes."""
    config = decoder_of(model).config
    return (
        getattr(config, "_attn_implementation", None) in ("sdpa", ATTENTION)
        and bool(getattr(model, "_supports_attention_backend", False))
        and getattr(config, "attn_logit_softcapping", None) is None
        and meets_in_attention(model)
    )


def can_pack(model: PreTrainedModel) -> bool:
    """Whether it is packed where it is.

    Restricted to the CPU: there a loop over short sequences is the fastest exact attention; on an accelerator it would
    be many small kernels.
    """
    return next(model.parameters()).device.type == "cpu" and packable(model)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    opd_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; without a layout it is plain sdpa."""
    if opd_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    opd_layout.read.set()
    window = kwargs.pop("sliding_window", None)
    # Segments tile the row. One split has one backward; a slice each would fill a row of zeros for every segment.
    lengths = [segment.length for segment in opd_layout.segments]
    number = {segment.start: i for i, segment in enumerate(opd_layout.segments)}
    queries, keys, values = (torch.split(x, lengths, 2) for x in (query, key, value))
    outputs = []
    for i, segment in enumerate(opd_layout.segments):
        before = sum(p.stop - p.start for p in segment.parents)
        k, v = keys[i], values[i]
        if before:
            parents = [number[p.start] for p in segment.parents]
            k = torch.cat([*(keys[p] for p in parents), k], 2)
            v = torch.cat([*(values[p] for p in parents), v], 2)
        mask = None
        if before or (window is not None and segment.length > window):
            mask = _mask(opd_layout, before, segment.length, window, query.device)
        outputs.append(_attend(module, queries[i], k, v, mask, **kwargs))
    return torch.cat(outputs, dim=1), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """`[1, T, heads, size]` of one segment, in the dtype of `value`."""
    if value.dtype == torch.float32 or key.shape[2] > SHORT:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    with torch.autocast(value.device.type, enabled=False):
        exact = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)[0]
        return exact.to(value.dtype)


def _mask(layout: Layout, before: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool `[1, 1, length, before + length]`: causal, `before` tokens in, within the window where there is one."""
    key = (before, length, window)
    if key not in layout.masks:
        row = torch.arange(before, before + length, device=device)[:, None]
        column = torch.arange(before + length, device=device)[None]
        allowed = column <= row
        if window is not None:
            allowed &= column > row - window
        layout.masks[key] = allowed[None, None]
    return layout.masks[key]


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
