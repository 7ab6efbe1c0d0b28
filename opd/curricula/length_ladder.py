"""Train on short completions first and on longer ones later, while the student keeps its entropy (Decoupling KL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from opd.context import Context
from opd.curricula.base import Asker, Course, Curriculum, Draw
from opd.curricula.shuffled import ShuffledCourse
from opd.errors import RunError
from opd.prompts import Prompt

ENTROPY = "held_out/student_entropy"


class LengthLadder(Curriculum):
    """Rungs of growing length, `steps_per_rung` steps each; one rung is a fixed length.

    With a gate the student's entropy (mean over all tokens of its own held-out samples) is measured at the end of each
    rung. At least the minimum: up to the next rung. Less: the run ends there, with the weights of the last rung that
    passed (`on_failure: restore`; the first rung's if none did) or with those of the rung that failed (`keep`).
    Optimiser state is kept across rungs.
    """

    kind: Literal["length_ladder"] = "length_ladder"
    modality: ClassVar[str | None] = "language"
    shown: ClassVar[tuple[str, ...]] = ("curriculum/rung",)
    lengths: list[int] = Field(min_length=1, description="Budget of actions on each rung, growing")
    steps_per_rung: int = Field(ge=1, description="Steps that each length lasts")
    minimum_entropy: float | None = Field(None, gt=0, description="The gate, in nats a token; default no gate")
    minimum_share: float | None = Field(
        None, gt=0, description="The gate, as a share of the student's entropy before training"
    )
    on_failure: Literal["restore", "keep"] = Field(
        "restore",
        description="Whose weights stay when a rung fails: those of the last one that passed, or its own",
    )

    @model_validator(mode="after")
    def _climbs(self) -> LengthLadder:
        if self.lengths != sorted(set(self.lengths)) or self.lengths[0] < 1:
            raise ValueError(f"lengths is {self.lengths}; the rungs of a ladder are positive and grow")
        if self.minimum_entropy is not None and self.minimum_share is not None:
            raise ValueError("give minimum_entropy or minimum_share, not both")
        return self

    @property
    def longest(self) -> int | None:
        return self.lengths[-1]

    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context) -> LadderCourse:
        return LadderCourse(self, ShuffledCourse(prompts, per_step, context.seed), context)


class LadderCourse(Course):
    """A built ladder. State: the rung, and the entropy before training. The weights of the last rung that passed are
    kept by the run."""

    def __init__(self, settings: LengthLadder, inner: ShuffledCourse, context: Context):
        whole = len(settings.lengths) * settings.steps_per_rung
        if context.steps != whole:
            raise RunError(
                f"steps is {context.steps}; the ladder's {len(settings.lengths)} rungs of "
                f"{settings.steps_per_rung} steps take steps: {whole}"
            )
        self.settings, self.inner = settings, inner
        self.rung = 0
        self.before: float | None = None
        self.ended = False

    @property
    def gated(self) -> bool:
        return self.settings.minimum_entropy is not None or self.settings.minimum_share is not None

    @property
    def minimum(self) -> float:
        """The gate in nats."""
        if self.settings.minimum_share is None:
            return self.settings.minimum_entropy or 0.0
        assert self.before is not None
        return self.settings.minimum_share * self.before

    def asks_evaluation(self, step: int) -> bool:
        return self.gated and step % self.settings.steps_per_rung == 0

    def next(self, step: int, signals: Mapping[str, float], asker: Asker) -> Draw | None:
        if self.before is None:
            self.before = signals.get(ENTROPY)
        if not self.ended and step == (self.rung + 1) * self.settings.steps_per_rung:
            self._end_of_rung(signals, asker)
        if self.ended:
            return None
        draw = self.inner.next(step, signals, asker)
        length = self.settings.lengths[self.rung]
        return Draw(draw.prompts, length, {"curriculum/rung": float(self.rung), "curriculum/length": float(length)})

    def _end_of_rung(self, signals: Mapping[str, float], asker: Asker) -> None:
        if self.gated and signals[ENTROPY] < self.minimum:
            self.ended = True
            if self.settings.on_failure == "restore":
                # Before the first rung passed nothing was kept, and the student stays as it is.
                asker.restore_weights()
            return
        if self.gated:
            asker.keep_weights()
        self.rung += 1
        self.ended = self.rung == len(self.settings.lengths)

    def state_dict(self) -> dict[str, Any]:
        return {"rung": self.rung, "before": self.before, "ended": self.ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rung, self.before, self.ended = state["rung"], state["before"], state["ended"]
