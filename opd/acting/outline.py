"""The shape of a policy over action tokens, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opd.acting.layout import Layout, read_statistics
from opd.acting.model import ActionModel, PolicySettings
from opd.acting.openvla import KNOWN, statistics_of_known
from opd.acting.seeing import Statistics
from opd.planning import DTYPE_BYTES, Shape


def policy_shape(settings: PolicySettings, notes: list[str], frozen: tuple[str, ...] = ()) -> Shape:
    """What a policy takes; its `model` is on the meta device. Parts whose names begin with one of `frozen` are not
    trained.

    Raises:
        ModelError: what a run would refuse too, in so far as it can be seen without weights.
    """
    layout, statistics = look(settings, notes)
    no_tokenizer: Any = None
    with torch.device("meta"):
        model = ActionModel(layout, no_tokenizer, statistics)
    parameters = sum(p.numel() for p in model.parameters())
    fixed = sum(p.numel() for name, p in model.named_parameters() if name.startswith(frozen)) if frozen else 0
    return Shape(
        name=settings.model,
        parameters=parameters,
        trainable=parameters - fixed,
        weight_bytes=DTYPE_BYTES.get(settings.dtype, 4) * parameters,
        width=layout.width,
        vocabulary=layout.bins,
        layers=layout.layers,
        model=model,
    )


def look(settings: PolicySettings, notes: list[str]) -> tuple[Layout, Statistics]:
    """Layout and action statistics of a policy: those of its folder, or of a common public model."""
    folder = Path(settings.model).expanduser()
    if not folder.is_dir() and settings.model in KNOWN:
        notes.append(
            f"{settings.model}: not read; its layout is the one that comes with opd, and its action statistics are "
            "taken to be the other models'"
        )
        return KNOWN[settings.model], statistics_of_known(settings.statistics or settings.model)
    return Layout.read(folder), read_statistics(folder, settings.statistics)
