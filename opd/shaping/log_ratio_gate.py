"""Tokens of which student and teacher think too differently leave the loss (Uni-OPD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from opd.compatibility import the_one
from opd.context import Context
from opd.distributions import Categorical, Distribution, Sampled, Target
from opd.errors import IncompatibleError
from opd.schedules import OverSteps
from opd.shaping.base import Shape, Shaper, Shaping
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.teachers import Answering


class LogRatioGate(Shaping):
    """A position weighs 0 where `|log p(a) - log q(a)|` of the action taken is `limit` or more: it is left out, while
    an objective's `clamp` keeps it with a bounded pull. Offsets of other shapings do not count here.

    Measured is `gated`, 1 where a position is left out.
    """

    kind: Literal["log_ratio_gate"] = "log_ratio_gate"
    modality: ClassVar[str | None] = "language"
    measures: ClassVar[tuple[str, ...]] = ("gated",)
    shown: ClassVar[tuple[str, ...]] = ("gated",)
    limit: Annotated[float, OverSteps(gt=0)] = Field(10.0, description="Nats from which on a position is left out")
    teacher: str | None = Field(None, description="Name of the teacher that is compared; default the only one")

    def words(self, measured: Mapping[str, float], reward: float | None) -> str | None:
        share = measured.get("gated", 0.0)
        return f"{share:.0%} of its tokens left out for their log-ratio" if share else None

    def build(self, context: Context) -> LogRatioGateShaper:
        return LogRatioGateShaper()

    def check_teachers(self, teachers: Sequence[Answering]) -> None:
        teacher = the_one(teachers, self.teacher, "shaping 'log_ratio_gate'")
        if teacher.answers.kind not in ("categorical", "sampled"):
            raise IncompatibleError(
                "shaping 'log_ratio_gate' needs the teacher's log-probability of the action taken, and this one "
                f"answers {teacher.answers.kind!r}: take a live teacher, or a store of kind exact or sampled"
            )


class LogRatioGateShaper(Shaper[LogRatioGate]):
    """The built shaping."""

    @torch.no_grad()
    def __call__(
        self, student: Distribution, targets: Sequence[Target], micro: Trajectories, settings: LogRatioGate
    ) -> Shape:
        assert isinstance(student, Categorical)
        taken = Sampled.of(student, micro.actions).log_probs
        gated = torch.zeros_like(taken, dtype=torch.bool)
        for target in targets:
            if settings.teacher in (None, target.teacher):
                answered = Sampled.of(target.distribution, micro.actions).log_probs
                gated |= (answered.to(taken) - taken).abs() >= settings.limit
        return Shape((~gated).float(), measured={"gated": gated.float()})
