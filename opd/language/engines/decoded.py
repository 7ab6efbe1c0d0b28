"""Engines whose decoder alone computes hidden states of what is read: rows laid out with or without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from opd.language.attention import attention_of
from opd.language.engines.base import EncodedPrompt
from opd.language.engines.cpu.packing import pack
from opd.language.engines.in_process import InProcess
from opd.language.engines.layouts import Layout, can_flatten, flatten, usual_layout
from opd.language.engines.padding import Side, pad
from opd.language.engines.reading import Reading


class Decoded(InProcess):
    """What is read of prompts (`read`) goes through the model's decoder, with completions behind it. Where family and
    attention allow it rows share a pass without padding."""

    caches: ClassVar[bool] = True

    def forward(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], layout: Layout = "auto"
    ) -> torch.Tensor:
        reading = self.read(contexts)
        layout = self._layout(layout, reading)
        if layout == "packed":
            return self._packed(reading, completions)
        if layout == "varlen":
            return self._flat(reading, completions)
        # The last token of a completion predicts nothing that is scored, so it is not fed.
        rows = [torch.cat([c, y[:-1].cpu()]) for c, y in zip(reading.ids, completions, strict=True)]
        side: Side = "left" if layout == "left" else "right"
        ids, mask = pad(rows, side)
        # What is asked of numbers is asked here, where nobody waits for a device.
        positions = reading.padded_positions(mask, side)
        attention = None if bool(mask.all()) else mask.to(self.device)
        hidden = reading.through(self, ids.to(self.device), attention, positions.to(self.device), use_cache=False)
        scored = torch.zeros_like(mask, dtype=torch.bool)
        for i, (context, row) in enumerate(zip(reading.ids, rows, strict=True)):
            shift = ids.shape[1] - len(row) if layout == "left" else 0
            scored[i, shift + len(context) - 1 : shift + len(row)] = True
        return hidden.flatten(0, 1)[scored.flatten().nonzero().squeeze(1).to(self.device)]

    def padding(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], layout: Layout = "auto"
    ) -> torch.Tensor | None:
        layout = self._layout(layout)
        if layout in ("packed", "varlen"):
            return None
        fed = [torch.ones(len(c) + len(y) - 1) for c, y in zip(contexts, completions, strict=True)]
        return pad(fed, "left" if layout == "left" else "right")[1].to(self.device)

    def _layout(self, layout: Layout, reading: Reading | None = None) -> Layout:
        """The layout itself, or what stands for it with this model, and what was read where that is known."""
        if layout == "auto" or (layout == "varlen" and not can_flatten(self.base)):
            layout = usual_layout(self.base, self.device.type)
        return "right" if reading is not None and reading.masked and layout in ("packed", "varlen") else layout

    def _flat(self, reading: Reading, completions: Sequence[torch.Tensor]) -> torch.Tensor:
        row = flatten(reading.ids, completions, self._positions(reading, completions))
        given = {**reading.inputs(row.ids.to(self.device)), **row.inputs(attention_of(self.base), self.device)}
        hidden: torch.Tensor = self.body(**given, use_cache=False).last_hidden_state
        return hidden[0, row.scored.to(self.device)]

    def _packed(self, reading: Reading, completions: Sequence[torch.Tensor]) -> torch.Tensor:
        row = pack(reading.ids, completions, self._positions(reading, completions)).to(self.device)
        return self.packed_body(row, reading.inputs(row.ids))[0, row.scored]

    @staticmethod
    def _positions(reading: Reading, completions: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Of what is fed of each row."""
        return reading.positions([len(c) + len(y) - 1 for c, y in zip(reading.ids, completions, strict=True)])
