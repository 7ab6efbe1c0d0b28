"""The target of a drafter: a language model whose hidden states are tapped, and which verifies blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from opd.distributions import Head, Vocabulary
from opd.drafting.base import Drafter, Outline
from opd.errors import IncompatibleError, ModelError
from opd.language.engines.cache import ROOM
from opd.language.engines.cpu.packing import ATTENTION
from opd.language.engines.in_process import InProcess
from opd.language.engines.prefill import cache_name
from opd.language.layers import decoder_layers, decoder_of


class Ragged(DynamicLayer):
    """Keys and values of rows of unequal length: the column of a token that stands is its position, so that what is
    written there again takes the place of one that did not."""

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None
        self.columns: torch.Tensor = torch.zeros(0, dtype=torch.int64)
        self.width = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.room is None or self.width > self.room[0].shape[2]:
            self.room = (self._grown(key_states, 0), self._grown(value_states, 1))
        place = self.columns[:, None, :, None]
        for buffer, states in zip(self.room, (key_states, value_states), strict=True):
            buffer.scatter_(2, place.expand_as(states), states)
        self.keys, self.values = self.room[0][:, :, : self.width], self.room[1][:, :, : self.width]
        return self.keys, self.values

    def take(self, rows: torch.Tensor) -> None:
        if self.room is not None:
            self.room = (self.room[0][rows], self.room[1][rows])

    def move(self, sources: torch.Tensor, places: torch.Tensor) -> None:
        """Write what is in int64 `[B, m]` columns into others, none of these twice."""
        for buffer in self.room or ():
            wanted = buffer.gather(2, sources[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3]))
            buffer.scatter_(2, places[:, None, :, None].expand_as(wanted), wanted)

    def _grown(self, like: torch.Tensor, which: int) -> torch.Tensor:
        made = like.new_zeros(len(like), like.shape[1], self.width + self.width // 4 + ROOM, like.shape[3])
        if self.room is not None:
            made[:, :, : self.room[which].shape[2]] = self.room[which]
        return made


class Target:
    """A language model as drafters see it.

    Args:
        taps: 0-based layers whose outputs are the features, side by side.
        which: what messages call it.

    Raises:
        ModelError: its layers cannot be tapped, or keep something else than all keys and values.
    """

    def __init__(self, language: InProcess, taps: Sequence[int] = (), which: str = "student.target"):
        self.language, self.taps, self.which = language, tuple(taps), which
        self.outline = Outline.of(language.base.config, which)
        body = decoder_of(language.base)
        layers, name = decoder_layers(body), cache_name(language)
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=language.base.config).layers)
        if layers is None or name is None or not plain or getattr(body.config, "alibi", False):
            raise ModelError(
                f"{which}: {language.family} does not keep keys and values of all tokens in each layer, and what"
                " a target has read of proposals that do not stand must be taken back; take one that does"
            )
        self.layers, self.cache_name = layers, name

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """`[..., D]`, detached: the rows of the input embedding."""
        layer: Any = self.language.base.get_input_embeddings()
        found: torch.Tensor = layer.weight.detach()[ids]
        return found

    def begin(self) -> DynamicCache:
        """An empty cache."""
        cache = DynamicCache(config=self.language.base.config)
        cache.layers = [Ragged() for _ in cache.layers]
        return cache

    @torch.no_grad()
    def read(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, seen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states `[B, n, D]` and features `[B, n, F]` of int64 `[B, n]` ids at `positions`, each of which
        sees all that the cache holds of its row at positions up to its own.

        Args:
            seen: bool `[B, n, n]`, where several ids have one position: which of them each sees, besides all that the
                cache holds at positions before the first of them. They are in the columns from that position on, until
                `keep` moves those that stand.
        """
        config: Any = decoder_of(self.language.base).config
        if config._attn_implementation not in ("sdpa", "eager", ATTENTION):
            raise IncompatibleError(
                f"{self.which}: attention is {config._attn_implementation!r}, which takes no mask of rows of unequal "
                "length; take sdpa or eager"
            )
        kept = [layer for layer in cache.layers if isinstance(layer, Ragged)]
        columns = positions
        if seen is not None:
            columns = positions[:, :1] + torch.arange(ids.shape[1], device=ids.device)
        width = max(int(columns.max()) + 1, kept[0].width)
        for layer in kept:
            layer.columns, layer.width = columns, width
        dtype = next(self.language.parameters()).dtype
        hidden_from = torch.arange(width, device=ids.device) > positions[:, :, None]
        if seen is not None:
            hidden_from = torch.arange(width, device=ids.device) >= positions[:, :1, None]
            hidden_from = hidden_from.expand(-1, ids.shape[1], -1).scatter(2, columns[:, None].expand_as(seen), ~seen)
        # Eager attention adds the mask: a boolean one would be taken for numbers.
        mask = torch.zeros(hidden_from.shape, dtype=dtype, device=ids.device)
        mask.masked_fill_(hidden_from, torch.finfo(dtype).min)
        with self._tapped() as taken:
            hidden = self.language.body(
                input_ids=ids,
                attention_mask=mask[:, None],
                position_ids=positions,
                use_cache=True,
                **{self.cache_name: cache},
            ).last_hidden_state
        return hidden, torch.cat([taken[tap] for tap in self.taps], -1) if self.taps else hidden[..., :0]

    @contextmanager
    def _tapped(self) -> Iterator[dict[int, torch.Tensor]]:
        """Inside, the outputs of the tapped layers are written down."""
        taken: dict[int, torch.Tensor] = {}

        def writer(tap: int) -> Any:
            def write(module: torch.nn.Module, args: object, output: Any) -> None:
                taken[tap] = output[0] if isinstance(output, tuple) else output

            return write

        hooks = [self.layers[tap].register_forward_hook(writer(tap)) for tap in self.taps]
        try:
            yield taken
        finally:
            for hook in hooks:
                hook.remove()


def take_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Keep the given rows of a target's cache, in this order."""
    for layer in cache.layers:
        assert isinstance(layer, Ragged)
        layer.take(rows)


def keep(cache: DynamicCache, sources: torch.Tensor, places: torch.Tensor) -> None:
    """Have int64 `[B, m]` columns of a target's cache stand in others, none of these twice."""
    for layer in cache.layers:
        assert isinstance(layer, Ragged)
        layer.move(sources, places)


def draft_head(drafter: Drafter, target: Target, vocabulary: Vocabulary, temperature: float) -> Head:
    """The head over the ids that a drafter may propose, its own or the target's; with a graph where it is trained."""
    own = drafter.own_head()
    if own is None:
        return target.language.head(temperature, vocabulary).detach()
    return Head(own, temperature=temperature, vocabulary=vocabulary)
