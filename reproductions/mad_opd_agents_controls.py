"""A control of the reproduction of MAD-OPD with agents: the teachers debate another state than the one they score."""

from __future__ import annotations

from typing import Literal

from opd.context import Context
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.prompts.messages import Messages
from opd.teachers.debate import DebateTeacher, LiveDebate
from reproductions.mad_opd_agents_machine import JAM, State, state_of


class ElsewhereTeacher(DebateTeacher):
    """A `debate` about a beginning with the same tool and another register."""

    kind: Literal["debate_elsewhere"] = "debate_elsewhere"  # type: ignore[assignment]

    def build(self, context: Context, student: Student) -> LiveElsewhere:
        return LiveElsewhere(self, super().build(context, student).experts)


class LiveElsewhere(LiveDebate):
    """The built control."""

    def topic(self, prompt: Prompt) -> str | Messages:
        view = super().topic(prompt)
        return view if isinstance(view, str) else [{"role": "user", "content": elsewhere(state_of(view))}]


def elsewhere(state: State) -> str:
    """What the machine says in the other state; where it is jammed, in one that is not."""
    return f"{(state.register + 3) % 10}{'u' if state.tool == JAM else state.tool}"
