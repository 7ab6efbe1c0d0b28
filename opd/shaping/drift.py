"""Positions weigh less and less once a rollout has left what the teacher knows (Prune-OPD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from opd.choice import OneOf
from opd.compatibility import Compatibility, the_one
from opd.compatibility.decay import decayed
from opd.compatibility.overlap import Overlap
from opd.context import Context
from opd.distributions import Distribution, Target
from opd.shaping.base import Shape, Shaper, Shaping
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.teachers import Answering


class DriftWeights(Shaping):
    """`max(0, 1 - drop * events so far) + base`: a weight that only falls along a rollout, by `drop` at each state
    where student and teacher part. With `base` what lies behind still teaches, only less.

    Measured are the signal, `drifted` (the share of events) and `reliable`: 1 up to the event that uses the weight up.
    A trajectory's number of reliable positions is its effective length.
    """

    kind: Literal["drift"] = "drift"
    modality: ClassVar[str | None] = "language"
    measures: ClassVar[tuple[str, ...]] = ("drifted", "reliable")
    shown: ClassVar[tuple[str, ...]] = ("drifted",)
    unweighed: ClassVar[str] = "set its weigh to false, with which it measures alone, or leave it out"
    signal: Annotated[Compatibility, OneOf(Compatibility)] = Field(
        Overlap(), description="What says at each state whether the two go together"
    )
    drop: float = Field(0.01, gt=0, le=1, description="What each drift event takes from the weight of all that follows")
    base: float = Field(0.5, ge=0, description="What is added to every weight")
    weigh: bool = Field(True, description="false leaves all weights at 1 and measures alone, for a window without them")
    teacher: str | None = Field(None, description="Name of the teacher that is compared; default the only one")

    @property
    def weighs(self) -> bool:
        return self.weigh

    def build(self, context: Context) -> DriftShaper:
        return DriftShaper()

    def check_teachers(self, teachers: Sequence[Answering]) -> None:
        self.signal.check_teacher(the_one(teachers, self.teacher, "shaping 'drift'"), "shaping 'drift'")


class DriftShaper(Shaper[DriftWeights]):
    """The built shaping. A weight follows from its own trajectory alone, so nothing is kept."""

    def __call__(
        self, student: Distribution, targets: Sequence[Target], micro: Trajectories, settings: DriftWeights
    ) -> Shape:
        answer = next(t.distribution for t in targets if settings.teacher in (None, t.teacher))
        signal = settings.signal.measure(student, answer, micro.actions)
        counts = micro.learnt.to(signal.device)
        events = settings.signal.events(signal) & counts
        weights, lasts = decayed(events, micro.lengths, settings.drop)
        measured = {settings.signal.measured: signal, "drifted": events.float(), "reliable": lasts.float()}
        return Shape(weights + settings.base if settings.weigh else torch.ones_like(weights), measured=measured)
