"""Texts that are written already, as target and drafter see them: all of a batch in a few passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from opd.distributions import Head
from opd.drafting.base import Drafter
from opd.drafting.decoding import chosen
from opd.drafting.target import Ragged, Target

LOGITS = 2**24
"""Of a drafter, or scores of the target's attention (of one head), that are held at once."""


class _Behind(DynamicLayer):
    """Keys and values of a text, to which each pass adds its own and leaves nothing behind."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


@dataclass(frozen=True)
class Texts:
    """B texts that their target has read, each a prompt and a response, padded on the right.

    Attributes:
        target: who read them.
        ids: int64 `[B, S + 1]`.
        hidden, features: `[B, S, D]` and `[B, S, F]`, of all positions but the last; detached.
        cache: the target's keys and values of these positions.
    """

    target: Target
    ids: torch.Tensor
    hidden: torch.Tensor
    features: torch.Tensor
    cache: DynamicCache

    @staticmethod
    def read(target: Target, texts: Sequence[torch.Tensor]) -> Texts:
        """Of B int64 `[P_i + T_i]` texts, of two tokens or more; one pass of the target."""
        device = target.language.device
        ids = torch.nn.utils.rnn.pad_sequence([text.cpu() for text in texts], batch_first=True).to(device)
        positions = torch.arange(ids.shape[1] - 1, device=device).expand(len(ids), -1)
        cache = target.begin()
        hidden, features = target.read(ids[:, :-1], positions, cache)
        return Texts(target, ids, hidden, features, cache)

    @torch.no_grad()
    def proposed(
        self, drafter: Drafter, drafts: Head, anchors: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 `[B, M, K]`, the likeliest proposals of blocks, and float32 `[B, M, K]`, their log-probabilities at a
        temperature of 1.

        Args:
            drafter: in eval mode.
            drafts: its head, at a temperature of 1.
            anchors: int64 `[B, M]`, positions in the texts, at least 1.
            count: K.
        """
        width = self.ids.shape[1] - 1
        positions = torch.arange(width, device=self.ids.device).expand(len(self.ids), width)
        features = self.features.to(next(drafter.parameters()).dtype)
        kept = drafter.read(features, self.ids[:, 1:], positions, self.target.embed)
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        tokens, log_q = list[torch.Tensor](), list[torch.Tensor]()

        def follow(k: int, hidden: torch.Tensor) -> torch.Tensor:
            log_probs = drafts.logits(hidden.flatten(0, 1)).log_softmax(-1)
            columns = chosen(log_probs)
            found = drafts.vocabulary.named(columns).unflatten(0, hidden.shape[:2])
            tokens.append(found)
            log_q.append(log_probs.gather(1, columns[:, None]).view_as(found))
            return found

        parts = []
        for some in anchors.split(max(1, LOGITS // (len(self.ids) * drafts.size)), 1):
            before, at = features[rows, some - 1], self.ids[rows, some]
            drafter.propose(kept, before, at, some, count, follow, self.target.embed)
            parts.append((torch.stack(tokens, 2), torch.stack(log_q, 2)))
            tokens.clear()
            log_q.clear()
        return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)

    def own(self, anchors: torch.Tensor, count: int) -> torch.Tensor:
        """int64 `[B, M, K]`: the text's own tokens at the slots of blocks; behind its end its last one again."""
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None, None]
        return self.ids[rows, self._behind(anchors, count).clamp(max=self.ids.shape[1] - 1)]

    def taught(self, anchors: torch.Tensor, count: int) -> torch.Tensor:
        """`[B, M, K, D]`: the target's final hidden states that teach slots which hold the text's own tokens."""
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None, None]
        return self.hidden[rows, (self._behind(anchors, count) - 1).clamp(max=self.hidden.shape[1] - 1)]

    @torch.no_grad()
    def judged(self, anchors: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """`[B, M, K, D]`: the target's final hidden states that teach slots which hold int64 `[B, M, K]` proposals,
        each given the text up to its anchor and the proposals before it in its block."""
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        first = self.hidden[rows, anchors][:, :, None]
        if blocks.shape[2] == 1:
            return first
        behind = [self._read_blocks(at, some) for at, some in self._pieces(anchors, blocks[:, :, :-1])]
        return torch.cat([first, torch.cat(behind, 1)], 2)

    def _pieces(self, anchors: torch.Tensor, blocks: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Some blocks after the other, so that no mask of a pass is larger than `LOGITS`."""
        batch, slots = len(blocks), blocks.shape[2]
        size = 1
        while batch * (2 * size * slots) * (self.hidden.shape[1] + 2 * size * slots) <= LOGITS:
            size *= 2
        yield from zip(anchors.split(size, 1), blocks.split(size, 1), strict=True)

    def _read_blocks(self, anchors: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """`[B, m, n, D]`, final hidden states at int64 `[B, m, n]` tokens behind the anchors."""
        language, (batch, count, slots) = self.target.language, blocks.shape
        device, length = self.ids.device, self.hidden.shape[1]
        of_block = torch.arange(count, device=device).repeat_interleave(slots)
        slot = torch.arange(slots, device=device).repeat(count)
        inside = (of_block[:, None] == of_block) & (slot[:, None] >= slot)
        before = torch.arange(length, device=device) <= anchors[:, of_block, None]
        seen = torch.cat([before, inside.expand(batch, -1, -1)], 2)
        dtype = next(language.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
        cache = DynamicCache()
        for layer in self.cache.layers:
            assert isinstance(layer, Ragged)
            assert layer.room is not None
            cache.layers.append(_Behind(*(kept[:, :, :length] for kept in layer.room)))
        hidden: torch.Tensor = language.body(
            input_ids=blocks.flatten(1),
            attention_mask=mask[:, None],
            position_ids=anchors[:, of_block] + 1 + slot,
            use_cache=True,
            **{self.target.cache_name: cache},
        ).last_hidden_state
        return hidden.unflatten(1, (count, slots))

    @staticmethod
    def _behind(anchors: torch.Tensor, count: int) -> torch.Tensor:
        """int64 `[B, M, K]`: the positions of slots."""
        return anchors[:, :, None] + torch.arange(1, count + 1, device=anchors.device)
