"""Margins by outcome, mended by leaving trajectories out (Uni-OPD's alternative)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from opd.compatibility import the_one
from opd.distributions import Target
from opd.shaping.margin import Calibrated, Margin, margin_of

if TYPE_CHECKING:
    from opd.teachers import Answering


class MarginMask(Margin):
    """Of a group whose margin is too small, the right trajectory of the least return or the wrong one of the largest is
    left out, whichever makes the margin larger, again and again until the margin is `delta` or nothing helps. Of either
    outcome the share `keep` stays, and at least one.

    A trajectory that is left out weighs 0 at all its positions and stays in the denominators.
    """

    kind: Literal["margin_mask"] = "margin_mask"
    measures: ClassVar[tuple[str, ...]] = (*Margin.measures, "margin_kept")
    keep: float = Field(0.25, ge=0, le=1, description="Share of the right and of the wrong ones that stays at least")
    teacher: str | None = Field(None, description="Name of the teacher that returns are made of; default the only one")

    def calibrate(self, returns: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor, margin: float) -> Calibrated:
        kept = torch.ones_like(right)
        floors = [max(1, int(self.keep * int(side.sum()))) for side in (right, wrong)]
        while margin < self.delta:
            tried: list[tuple[float, int]] = []
            # The right one comes first and wins a tie.
            for side, floor, sign in ((right, floors[0], 1), (wrong, floors[1], -1)):
                members = (side & kept).nonzero()[:, 0]
                if len(members) > floor:
                    out = int(members[(sign * returns[members]).argmin()])
                    rest = kept.index_fill(0, torch.tensor([out]), False)
                    tried.append((margin_of(returns, right & rest, wrong & rest, self.statistic), out))
            best, out = max(tried, key=lambda pair: pair[0], default=(margin, -1))
            if best <= margin:
                break
            margin, kept = best, kept.index_fill(0, torch.tensor([out]), False)
        return Calibrated(torch.zeros_like(returns), kept)

    def moved(self, measured: Mapping[str, float]) -> str | None:
        return "left out" if measured.get("margin_kept") == 0 else None

    def mine(self, targets: Sequence[Target]) -> Sequence[Target]:
        return [target for target in targets if self.teacher in (None, target.teacher)]

    def check_teachers(self, teachers: Sequence[Answering]) -> None:
        self.check_answers(the_one(teachers, self.teacher, "shaping 'margin_mask'"))
