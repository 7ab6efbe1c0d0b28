"""Many trajectories in one row, without padding, and a prompt once for its whole group.

A row is `[prompt, y1, y2, ..., prompt', y1', ...]`. Each completion attends to its prompt and itself; nothing attends
across. The result equals that of separate padded rows; what is saved is the padding and the repeated prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "opd_packed"


@dataclass(frozen=True)
class Layout:
    """Where things lie in a packed row of L tokens.

    Attributes:
        ids, positions: int64 `[1, L]`.
        groups: `(start of the prompt, its length, lengths of the completions that follow it)`.
        scored: int64 `[N]`, places in the row whose hidden state predicts the N actions, in packed order.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    groups: tuple[tuple[int, int, tuple[int, ...]], ...]
    scored: torch.Tensor

    def to(self, device: torch.device) -> Layout:
        return Layout(self.ids.to(device), self.positions.to(device), self.groups, self.scored.to(device))


def pack(contexts: Sequence[torch.Tensor], completions: Sequence[torch.Tensor]) -> Layout:
    """Lay out B trajectories; neighbours with the same context share it. The last token of each is not fed."""
    pieces: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    scored: list[torch.Tensor] = []
    groups: list[tuple[int, int, tuple[int, ...]]] = []
    place, first = 0, 0
    while first < len(contexts):
        context = contexts[first].cpu()
        stop = first + 1
        while stop < len(contexts) and _same(contexts[stop], contexts[first]):
            stop += 1
        start, prompt = place, len(context)
        pieces.append(context)
        positions.append(torch.arange(prompt))
        place += prompt
        lengths = []
        for completion in completions[first:stop]:
            fed = completion[:-1].cpu()
            pieces.append(fed)
            positions.append(torch.arange(prompt, prompt + len(fed)))
            scored.append(torch.tensor([start + prompt - 1]))
            scored.append(torch.arange(place, place + len(fed)))
            place += len(fed)
            lengths.append(len(fed))
        groups.append((start, prompt, tuple(lengths)))
        first = stop
    return Layout(torch.cat(pieces)[None], torch.cat(positions)[None], tuple(groups), torch.cat(scored))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (len(a) == len(b) and torch.equal(a, b))


def can_pack(model: Any) -> bool:
    """Whether a transformers model attends through the pluggable interface with plain softmax attention throughout.

    Restricted to the CPU: there a loop over short sequences is the fastest exact attention; on an accelerator it would
    be many small kernels, and padded batches are used.
    """
    layers = getattr(model.get_decoder(), "layers", [])
    config = model.config
    return (
        next(model.parameters()).device.type == "cpu"
        and getattr(config, "_attn_implementation", None) in ("sdpa", ATTENTION)
        and bool(getattr(model, "_supports_attention_backend", False))
        and all(hasattr(layer, "self_attn") for layer in layers)
        and getattr(config, "attn_logit_softcapping", None) is None
    )


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
    window = kwargs.pop("sliding_window", None)
    outputs = []

    def attend(start: int, length: int, prompt: slice | None) -> None:
        own = slice(start, start + length)
        k, v = key[:, :, own], value[:, :, own]
        before = 0
        if prompt is not None:
            before = prompt.stop - prompt.start
            k, v = torch.cat([key[:, :, prompt], k], 2), torch.cat([value[:, :, prompt], v], 2)
        mask = None
        if prompt is not None or (window is not None and length > window):
            row = torch.arange(before, before + length, device=query.device)[:, None]
            column = torch.arange(before + length, device=query.device)[None]
            allowed = column <= row
            if window is not None:
                allowed &= column > row - window
            mask = allowed[None, None]
        outputs.append(sdpa_attention_forward(module, query[:, :, own], k, v, mask, **kwargs)[0])

    for start, length, completions in opd_layout.groups:
        attend_prompt = slice(start, start + length)
        if len(completions) == 1:
            # A lone completion continues its prompt: one causal sequence.
            attend(start, length + completions[0], None)
            continue
        attend(start, length, None)
        place = start + length
        for fed in completions:
            if fed:
                attend(place, fed, attend_prompt)
            place += fed
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
