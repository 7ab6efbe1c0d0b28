"""On-policy: the student extends the prompts itself, in this process or by an engine that holds its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from opd.choice import OneOf
from opd.context import Context
from opd.drafting.faster import Helped
from opd.engines import RolloutEngine
from opd.language.engines.in_process import language_of
from opd.language.rollout import LanguageRollout, SamplingSettings
from opd.planning import Shape
from opd.rollouts.base import OneSource, Sampling

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class StudentRollout(SamplingSettings, OneSource):
    """Ancestral sampling at the run's temperature. `top_p` and `top_k` cut the distribution that is drawn from; then
    the states are no longer exactly the student's own, while the loss still compares whole distributions."""

    kind: Literal["student"] = "student"
    engine: Annotated[RolloutEngine, OneOf(RolloutEngine)] | None = Field(
        None, description="Who draws, where not this process: a server that takes up the student's weights"
    )
    modality: ClassVar[str | None] = "language"
    drafter: Helped | None = Field(
        None, description="A drafter that proposes while the student writes: the same distribution, in less time"
    )

    @model_validator(mode="after")
    def _one_helper(self) -> Self:
        if self.drafter is not None and self.engine is not None:
            raise ValueError("a drafter helps this process to write, and an engine writes elsewhere; remove one")
        if self.drafter is not None and self.watch is not None:
            raise ValueError(
                "a watch looks between segments of one length, and a drafter writes rows of unequal length; remove "
                "watch, or drafter"
            )
        return self

    def samplers(
        self, student: Shape, teachers: Sequence[tuple[str | None, Sequence[Shape]]]
    ) -> Iterator[tuple[Sampling, Shape]]:
        if self.engine is None:
            yield self, student

    @model_validator(mode="after")
    def _drawn_elsewhere(self) -> Self:
        if self.engine is None:
            return self
        own = {name: getattr(self, name) for name in ("dtype", "batch")}
        for name, value in own.items():
            if value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {value} and says how this process draws; with an engine the server decides: remove it"
                )
        if self.watch is not None and getattr(self.engine, "overlap", False):
            raise ValueError("watch and engine.overlap: nobody looks at what is written ahead; leave one of them out")
        return self

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> LanguageRollout:
        watch = None if self.watch is None else self.watch.build(context, student, teachers)
        language = language_of(student, "the student")
        writer = None if self.engine is None else self.engine.build(language, context)
        if writer is not None:
            with ExitStack() as opened:
                opened.callback(writer.close)
                writer.check_teachers([teacher.settings for teacher in teachers])
                opened.pop_all()
        early = [teacher for teacher in teachers if getattr(teacher, "early", False)]
        faster = None if self.drafter is None else self.drafter.build(language, context, "the student")
        return LanguageRollout(language, self, context, watch=watch, writer=writer, listeners=early, faster=faster)
