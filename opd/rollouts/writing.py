"""What rollouts share in which the student writes texts: how it draws, and who draws for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, model_validator

from opd.choice import OneOf, kind_of
from opd.context import Context
from opd.engines import RolloutEngine
from opd.language.engines.in_process import language_of
from opd.language.rollout import LanguageRollout, SamplingSettings
from opd.planning import Shape
from opd.rollouts.base import OneSource, Sampling

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class StudentWrites(SamplingSettings, OneSource):
    """Base of rollouts in which the student writes."""

    engine: Annotated[RolloutEngine, OneOf(RolloutEngine)] | None = Field(
        None, description="Who draws, where not the student alone: a server that has its weights, a drafter that helps"
    )
    modality: ClassVar[str | None] = "language"

    def samplers(
        self, student: Shape, teachers: Sequence[tuple[str | None, Sequence[Shape]]]
    ) -> Iterator[tuple[Sampling, Shape]]:
        if self.engine is None or self.engine.here:
            yield self, student

    @model_validator(mode="after")
    def _fits_engine(self) -> Self:
        if self.engine is None:
            return self
        if self.watch is not None and not self.engine.watched:
            raise ValueError(
                f"a watch looks between segments, and the engine {kind_of(self.engine)!r} writes rows that have none; "
                "remove watch, or engine"
            )
        own = {} if self.engine.here else {name: getattr(self, name) for name in ("dtype", "batch")}
        for name, value in own.items():
            if value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {value} and says how this process draws; with an engine the server decides: remove it"
                )
        if self.watch is not None and getattr(self.engine, "overlap", False):
            raise ValueError("watch and engine.overlap: nobody looks at what is written ahead; leave one of them out")
        return self

    def writer(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> LanguageRollout:
        """What draws one completion of each prompt, with the watch and the engine of these settings."""
        watch = None if self.watch is None else self.watch.build(context, student, teachers)
        language = language_of(student, "the student")
        early = [teacher for teacher in teachers if getattr(teacher, "early", False)]
        made = LanguageRollout(language, self, context, watch=watch, engine=self.engine, listeners=early)
        with ExitStack() as opened:
            opened.callback(made.close)
            if made.writer is not None:
                made.writer.check_teachers([teacher.settings for teacher in teachers])
            opened.pop_all()
        return made
