"""Margins by outcome, mended by a constant on the teacher's word (Uni-OPD's main method)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from opd.errors import IncompatibleError
from opd.shaping.margin import Calibrated, Margin

if TYPE_CHECKING:
    from opd.teachers import Answering


class MarginShift(Margin):
    """What the margin of a group lacks, `lam = delta - margin`, is added to the teacher's log-probability of every
    action of its right trajectories (`lift`), taken from its wrong ones' (`incorrect_down`), or half of each
    (`spread`). Then the margin is `delta`, with either statistic.

    With `reduction: sequence_mean` the shift counts alike in short and long trajectories; with the others it counts by
    length. An objective's `clamp` bounds the shifted log-ratios.
    """

    kind: Literal["margin_shift"] = "margin_shift"
    makes_offsets: ClassVar[bool] = True
    direction: Literal["lift", "incorrect_down", "spread"] = Field("spread", description="Who is moved")

    def calibrate(self, returns: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor, margin: float) -> Calibrated:
        lam = self.delta - margin
        up, down = {"lift": (1.0, 0.0), "incorrect_down": (0.0, 1.0), "spread": (0.5, 0.5)}[self.direction]
        offsets = lam * (up * right.to(returns) - down * wrong.to(returns))
        return Calibrated(offsets, torch.ones_like(right))

    def moved(self, measured: Mapping[str, float]) -> str | None:
        shift = measured.get("offset", 0.0)
        return f"{shift:+.2f} nats a token" if shift else None

    def check_teachers(self, teachers: Sequence[Answering]) -> None:
        if len(teachers) != 1:
            raise IncompatibleError(
                f"shaping 'margin_shift' moves the word of one teacher, and the recipe has {len(teachers)}: let one "
                "of kind routed choose among them, or take margin_mask"
            )
        self.check_answers(teachers[0])
