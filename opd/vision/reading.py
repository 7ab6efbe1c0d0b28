"""Prompts with pictures as a decoder reads them: features in the places of some ids, and positions on several axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from opd.language.engines.reading import Reading

if TYPE_CHECKING:
    from opd.language.engines.in_process import InProcess


@dataclass(frozen=True)
class Seen:
    """What a decoder gets of one prompt's pictures.

    Attributes:
        features: `[F, D]`, in the places of the F ids that stand for pictures, in order.
        positions: int64 `[P]` or `[A, P]` of the prompt's tokens on the CPU; None where they are counted from 0.
        layers: `[F, D]` each, what is added at those places behind the first layers.
        types: under which name the model is told which tokens are pictures, where it makes its mask of that.
    """

    features: torch.Tensor
    positions: torch.Tensor | None
    layers: tuple[torch.Tensor, ...]
    types: str | None

    @property
    def size(self) -> int:
        return sum(each.nbytes for each in (self.features, *self.layers))


class PictureReading(Reading):
    """B prompts; the i-th feature of all distinct pictures stands where the id is `-1 - i`.

    Args:
        ids: B int64 `[P_i]` as they were read.
        seen: what is seen in each; None for text. Neighbours with the same pictures share one.
        picture_ids: the ids that stand for pictures and frames of videos.
        model: whose decoder reads.
    """

    def __init__(
        self,
        ids: Sequence[torch.Tensor],
        seen: Sequence[Seen | None],
        picture_ids: Sequence[int],
        model: PreTrainedModel,
    ):
        self.model, self.seen = model, seen
        firsts: dict[int, int] = {}
        distinct: list[Seen] = []
        count, coded = 0, []
        for row, found in zip(ids, seen, strict=True):
            row = row.cpu()
            if found is not None:
                if id(found) not in firsts:
                    firsts[id(found)] = count
                    distinct.append(found)
                    count += len(found.features)
                places = torch.isin(row, torch.tensor(picture_ids))
                row = row.clone()
                row[places] = -1 - firsts[id(found)] - torch.arange(int(places.sum()))
            coded.append(row)
        super().__init__(coded)
        self.features = torch.cat([found.features for found in distinct]) if distinct else None
        layers = zip(*(found.layers for found in distinct), strict=True)
        self.layers = [torch.cat(layer) for layer in layers]
        self.types = next((found.types for found in distinct if found.types is not None), None)
        self.masked = self.types is not None
        self.axes = next((len(f.positions) for f in distinct if f.positions is not None and f.positions.dim() == 2), 0)

    def positions(self, lengths: Sequence[int]) -> list[torch.Tensor] | None:
        if all(found is None or found.positions is None for found in self.seen):
            return None
        return [self._placed(found, length) for found, length in zip(self.seen, lengths, strict=True)]

    def _placed(self, found: Seen | None, length: int) -> torch.Tensor:
        """int64 `[L]`, or `[A, L]`: what stands behind a prompt is text, and goes on from its largest position."""
        held = torch.zeros(0, dtype=torch.int64)
        first = 0
        if found is not None and found.positions is not None:
            held = found.positions[..., :length]
            first = int(found.positions.max()) + 1
        rest = torch.arange(first, first + length - held.shape[-1])
        if self.axes and held.dim() == 1:
            held = held.expand(self.axes, -1)
        return torch.cat([held, rest.expand(*held.shape[:-1], -1)], -1)

    def inputs(self, ids: torch.Tensor) -> dict[str, object]:
        if self.features is None:
            return {"input_ids": ids}
        here = ids < 0
        table: Any = self.model.get_input_embeddings()
        embeds = table(ids.clamp(min=0))
        which = -1 - ids[here]
        embeds = embeds.masked_scatter(here[..., None], self.features[which].to(embeds.dtype))
        given: dict[str, object] = {"inputs_embeds": embeds}
        if self.layers:
            given |= {"visual_pos_masks": here, "deepstack_visual_embeds": [layer[which] for layer in self.layers]}
        return given

    def through(
        self,
        model: InProcess,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        **options: object,
    ) -> torch.Tensor:
        if self.types is None:
            return super().through(model, ids, mask, positions, **options)
        # The model makes its mask of which tokens are pictures, and hands it to the decoder.
        outer: Any = getattr(self.model, self.model.base_model_prefix)
        given = {**self.inputs(ids), self.types: (ids < 0).long(), **options}
        hidden: torch.Tensor = outer(attention_mask=mask, position_ids=positions, **given).last_hidden_state
        return hidden
