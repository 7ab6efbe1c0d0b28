"""In-flight pruning: a rollout ends while it is being written, once it has left what the teacher knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from opd.choice import OneOf
from opd.compatibility import Compatibility, the_one
from opd.compatibility.decay import most_events
from opd.compatibility.overlap import Overlap
from opd.context import Context
from opd.distributions import Distribution, Target, TopK, joined
from opd.planning import Shape
from opd.watches.base import Findings, LiveWatch, Rows, Watch

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import Answering, LiveTeacher


WHOSE = "rollout.watch 'drift'"


class Drift(Watch):
    """Ends a completion that has drifted away from the teacher, at drift event number `ceil(1 / drop)`. The teacher
    scores new tokens as they come, and what it said is its answer for the loss: no state is scored twice.

    What lies behind the end is not learnt from at all: shorter texts than the student's own are what a verifier judges
    and what a step sees, and states that only long rollouts reach are missing from it.
    """

    kind: Literal["drift"] = "drift"
    signal: Annotated[Compatibility, OneOf(Compatibility)] = Field(
        Overlap(), description="What says at each state whether student and teacher go together"
    )
    drop: float = Field(0.01, gt=0, le=1, description="What each drift event takes from the weight; a row ends at 0")
    teacher: str | None = Field(None, description="Name of the teacher that watches; default the only one")

    def scorers(self, teachers: Sequence[tuple[str | None, Sequence[Shape]]]) -> Sequence[Shape]:
        return next((shapes for name, shapes in teachers if self.teacher in (None, name)), ())

    def check_teachers(self, teachers: Sequence[Answering], home: torch.device) -> None:
        teacher = the_one(teachers, self.teacher, WHOSE)
        self.signal.check_teacher(teacher, WHOSE)
        teacher.settings.check_scorer(home)

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> DriftWatch:
        self.check_teachers(teachers, context.device)
        teacher = the_one(teachers, self.teacher, WHOSE)
        teacher.check_scorer(context)
        return DriftWatch(teacher, self.signal.k)


class DriftWatch(LiveWatch[Drift]):
    """The built watch, with a scorer of the teacher's for the rows that came together."""

    def __init__(self, teacher: LiveTeacher, candidates: int):
        self.teacher, self.candidates = teacher, candidates

    def begin(self, rows: Rows[Drift]) -> None:
        self.scorer = self.teacher.scorer(rows.prompts, rows.begun, rows.context)
        self.scored = [0] * len(rows)
        self.events = [0] * len(rows)
        self.said: list[tuple[Distribution, list[tuple[int, int, int]]]] = []

    def look(self, rows: Rows[Drift]) -> Mapping[int, str]:
        self._score(rows)
        most = most_events(rows.settings.drop)
        drifted = {p: f"drifted, {self.events[p]} events" for p in rows.going if self.events[p] >= most}
        going = set(rows.going) - drifted.keys()
        self.scorer.drop([place for place in range(len(rows)) if place not in going])
        return drifted

    def end(self, rows: Rows[Drift]) -> Findings:
        self._score(rows)
        if not self.said:
            # Nobody wrote anything, as a server that is gone.
            return Findings()
        starts = torch.tensor([0, *(len(actions) for actions in rows.actions)]).cumsum(0).tolist()
        places = [
            torch.cat([torch.arange(starts[p] + first, starts[p] + stop) for p, first, stop in spans])
            for _, spans in self.said
        ]
        # Parts are joined by ascending positions.
        parts = [part.select(mine.argsort()) for (part, _), mine in zip(self.said, places, strict=True)]
        answer = joined(parts, [mine.sort().values for mine in places])
        return Findings(answers=(Target(answer, teacher=self.teacher.settings.name),))

    def _score(self, rows: Rows[Drift]) -> None:
        """Have the teacher look at what was written since, and count the events."""
        new = {
            place: actions[self.scored[place] :]
            for place, actions in enumerate(rows.actions)
            if len(actions) > self.scored[place]
        }
        if not new:
            return
        said = self.scorer.extend(new)
        spans = [(place, self.scored[place], len(rows.actions[place])) for place in new]
        parts = [rows.candidates[place].select(slice(first, stop)) for place, first, stop in spans]
        own = TopK(torch.cat([part.log_probs for part in parts]), torch.cat([part.ids for part in parts]))
        signal = rows.settings.signal.measure(own, said, torch.cat(list(new.values())))
        drifted = rows.settings.signal.events(signal)
        of_each = torch.split(drifted, [len(tokens) for tokens in new.values()])
        for (place, _, stop), mine in zip(spans, of_each, strict=True):
            self.events[place] += int(mine.sum())
            self.scored[place] = stop
        self.said.append((said, spans))
