"""Rows of unequal length side by side, with padding on one side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Side = Literal["right", "left"]


def pad(rows: Sequence[torch.Tensor], side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, L]` ids and int64 mask. The filler id is 0; only the mask says what is padding."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return ids, mask
