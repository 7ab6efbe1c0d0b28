"""Teachers: asked at every state that the student visited, they answer with a distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from pydantic import Field

from opd.choice import Choice, kind_of, names_a_place
from opd.context import Context
from opd.distributions import Distribution, Target, Vocabulary
from opd.errors import IncompatibleError
from opd.language.engines.base import Scorer
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.reduction import sums_by_trajectory
from opd.schedules import OverSteps
from opd.trajectories import Trajectories

S = TypeVar("S", bound="Teacher")


class Answering(Protocol):
    """A teacher as far as its answers are known: a built one, or one that a plan foresees."""

    @property
    def settings(self) -> Teacher: ...

    @property
    def answers(self) -> type[Distribution]: ...


class LiveTeacher(ABC, Generic[S]):
    """A built teacher, of the settings `S`. One that moves has `state_dict` and `load_state_dict` besides."""

    answers: type[Distribution]
    """The kind of its answers."""

    settings: S
    """As the recipe has them, with its schedules; those of a step come with each question."""

    everywhere: bool = True
    """Whether it answers at any state, or only at those that it scored before."""

    vocabulary: Vocabulary | None = None
    """The ids that its answers give probability to, where that is fixed and it has no language model to ask."""

    voices: int = 1
    """How many models answer at each position, each with a target of its own."""

    member_role: ClassVar[str] = "route"
    """What messages call a member: one of several routes, of which one answers a prompt, or an expert, who all do."""

    translates: ClassVar[bool] = False
    """Whether it reads completions again in a tokenizer of its own (`tokenizer: own`), and so writes none here."""

    asked: float = 1.0
    """Share of the last call's positions, of each voice, for which its model was run."""

    remembers: bool = False
    """Whether it keeps answers, so that `asked` is worth logging as a hit rate."""

    @property
    def notes(self) -> list[str]:
        """What a person should know of this teacher before the run, one sentence each."""
        return []

    @abstractmethod
    def answer(self, trajectories: Trajectories, settings: S, context: Context) -> list[Target]:
        """What it says at the N positions of `trajectories`, under its own view of the prompt: one target, or several
        whose divergences are summed, as of a debate.

        Each is detached, lies on `context.device` and bears the name of `settings`. Its weight, a number or float32
        `[N]`, is that beside `settings.weight`, which whoever asks multiplies (`answers_of`).

        Args:
            settings: the teacher's at this step, numbers in the places of schedules.
            context: facts of the run at this step.
        """

    def check_scorer(self, context: Context) -> None:
        """Raise `IncompatibleError` when it cannot answer while a text is being written."""
        raise answers_whole_texts_alone(self.settings)

    def scorer(self, prompts: Sequence[Prompt], begun: Sequence[torch.Tensor], context: Context) -> Scorer:
        """What it says of completions that are being written, under its own view of the prompts.

        Args:
            prompts: of B rows.
            begun: B int64 `[T_i]`, what stands before a row's first new token.
            context: facts of the run at this step.

        Raises:
            IncompatibleError: see `check_scorer`.
        """
        raise answers_whole_texts_alone(self.settings)

    def prepare(self, prompts: Sequence[Prompt], context: Context) -> None:
        """Told of prompts about whose trajectories `answer` will be asked in several parts: what depends on the prompts
        alone can be made for all of them together."""

    early: bool = False
    """Whether `expect` begins something."""

    def expect(self, prompt: Prompt, actions: torch.Tensor) -> None:
        """Told, from whatever thread, of a trajectory about which `answer` will probably ask, int64 `[T]`, as soon as
        it is written: a teacher elsewhere can begin while others are written."""

    def close(self) -> None:
        """The run is over; another question may still come, and it may be called twice."""
        for member in self.members().values():
            if member is not self:
                member.close()

    def failures(self) -> dict[str, int]:
        """How often it was asked in vain since it was built, by reason; empty for one that answers always."""
        return {}

    def members(self) -> dict[str, LiveTeacher]:
        """Those who answer, by route; a teacher that answers every prompt itself is its only member."""
        return {"": self}

    @property
    def leaves_out(self) -> bool:
        """Whether texts that it cannot read are left out, so that a rollout without an answer is no fault."""
        return False

    def common_ids(self, context: Context) -> int | None:
        """How many of the student's ids its answers tell apart, where that is less than those agreed on."""
        return None

    def route(self, prompt: Prompt) -> str | None:
        """Which member answers a prompt, where there is a choice."""
        return None

    def begin_step(self) -> None:
        """A step begins: what `own_signals` would say of answers before it, those to held-out rows, is of no step."""
        for member in self.members().values():
            if member is not self:
                member.begin_step()

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What it did since it was last asked this beside answering, on all processes, which must all ask; logged as
        train/NAME."""
        return {}

    def considered(self, prompt: Prompt) -> Mapping[str, Any] | None:
        """What a debate came to about a prompt that was answered, for logs and the report, as plain data with the
        experts' texts by round in `rounds`; None for a teacher that only answers."""
        return None

    def identity(self) -> str | None:
        """Hash of the weights that its answers come from; None for a teacher that is made of the student."""
        return None

    def fingerprint(self) -> str:
        """Of what does not move, so that a run goes on under the same teacher: its identity; empty where there is
        none."""
        return self.identity() or ""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` for a prompt of which this teacher has no view."""

    def check_lengths(self, prompts: Sequence[Prompt], budget: int, which: str) -> list[str]:
        """Warnings about prompts with completions of up to `budget` that are longer than what its model was made for;
        raises `ModelError` where it cannot read them. `which` names it."""
        return []

    def prompt_length(self, prompt: Prompt) -> int | None:
        """Tokens of a prompt as its model reads it; None where nobody counts them."""
        return None

    def check_student(self, student: Student, context: Context) -> None:
        """Raise `IncompatibleError` when what it knows does not fit the built student and the agreed `context`."""

    def check_origin(self, student: Student) -> None:
        """Raise `IncompatibleError` when an objective asks for the teacher of the student's fine-tuning and it is
        another one. Told apart only by teachers whose answers were written down; a live one passes."""

    def check_outputs(self, trajectories: Trajectories, which: str) -> None:
        """Raise `SelfTestError` when its answers are not made of its model's own outputs; `which` names it."""

    def follow(self, student: Student) -> None:
        """Called after every optimiser step; a teacher that is made of the student moves here."""


def answers_whole_texts_alone(settings: Teacher) -> IncompatibleError:
    """What is said of a teacher that is asked while rollouts are written and cannot answer then."""
    return IncompatibleError(
        f"teacher {settings.name or kind_of(settings)!r} answers whole trajectories alone, and rollout.watch asks it "
        "while they are written: take a teacher of kind local, self or routed, or leave out rollout.watch"
    )


def answers_of(teacher: LiveTeacher, trajectories: Trajectories, settings: Teacher, context: Context) -> list[Target]:
    """What a teacher says of trajectories, with its name and its weight: read where that came with them, since whoever
    wrote them has asked already, and else asked for. Arguments are those of `LiveTeacher.answer`."""
    came = [target for target in trajectories.answers or () if target.teacher == settings.name]
    return [
        replace(target, weight=settings.weight * target.weight, teacher=settings.name)
        for target in came or teacher.answer(trajectories, settings, context)
    ]


def unanswered(trajectories: Trajectories, targets: Sequence[Target]) -> torch.Tensor:
    """bool `[B]`: the trajectories about which some teacher was asked in vain."""
    lost = torch.zeros(len(trajectories), dtype=torch.bool)
    for missing in (target.missing for target in targets):
        if missing is not None:
            lost |= sums_by_trajectory(missing.float().cpu(), trajectories.lengths) > 0
    return lost


class Fails(Protocol):
    """A teacher that may be asked in vain, or a writer that may write nothing."""

    def failures(self) -> Mapping[str, int]:
        """How often, by reason."""


def failures_of(parts: Sequence[Fails]) -> Counter[str]:
    """How often what went wrong so far, in all parts."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.failures())
    return counts


def reasons(
    parts: Sequence[Fails],
    gather: Callable[[list[Mapping[str, int]]], list[Mapping[str, int]]] = list,
    since: Mapping[str, int] | None = None,
) -> str:
    """Why trajectories were lost so far, the commonest reason first; with `gather`, which brings lists of all processes
    together, on any of them; with `since`, what `failures_of` said earlier, since then."""
    counts: Counter[str] = Counter()
    for found in gather([failures_of(parts) - Counter(since or {})]):
        counts.update(found)
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common(4)) or "no reason was given"


class DebateSize(NamedTuple):
    """A debate's at most, for a plan: texts of `length` tokens that `experts` write in each of `rounds`, each about
    `rows` prompts at once."""

    experts: int = 0
    rounds: int = 0
    length: int = 0
    rows: int = 1

    @property
    def transcript(self) -> int:
        """Tokens of all texts together."""
        return self.experts * self.rounds * self.length

    @property
    def longest(self) -> int:
        """Tokens of what stands behind the prompt when the last text ends."""
        return (self.experts * (self.rounds - 1) + 1) * self.length if self.rounds else 0

    def tokens(self, prompt: int) -> int:
        """Tokens that one expert reads and writes about a prompt of `prompt` tokens."""
        before = self.experts * self.length * self.rounds * (self.rounds - 1) // 2
        return self.rounds * (prompt + self.length) + before


class Teacher(Choice):
    """Base of the axis. A recipe may list several; their divergences are summed with their weights."""

    axis: ClassVar[str] = "teacher"
    name: str | None = Field(None, description="What an objective or a rollout calls this teacher")
    weight: Annotated[float, OverSteps(ge=0)] = Field(1.0, description="Factor of this teacher's divergence")
    sees: str | None = Field(None, description="Column with this teacher's view of the prompt; default the student's")
    batch: int = Field(16, ge=1, description="Trajectories scored in one forward pass")

    @classmethod
    def shorthand(cls, value: object) -> dict[str, Any] | None:
        """A model's name or place."""
        return {"model": value} if isinstance(value, str) and names_a_place(value) else None

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        """What its models take, without their weights; one of them answers at each position. None are counted of a
        teacher that holds no model. What a person should know goes to `notes`."""
        return []

    def voiced(self, student: Shape, notes: list[str]) -> list[list[Shape]]:
        """The same for each of the voices that answer at every position, of which each may be of several models."""
        return [self.shapes(student, notes)]

    @property
    def debate(self) -> DebateSize:
        """How much is written before it answers."""
        return DebateSize()

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        """Of which kinds its answers will be, with what gives them, as far as that is known before it is built;
        `student` is the kind of the student's own."""
        return []

    @property
    def listed(self) -> int | None:
        """How many ids of each state its answers list, where that is settled before it is built; None where they are of
        all ids, or where nobody knows."""
        return None

    def view(self, prompt: Prompt) -> tuple[Prompt, str | None]:
        """What it reads of a prompt, for `encode`: a row, which may be a copy with more in it, and the column of it;
        None is the student's own."""
        return prompt, self.sees

    def check_temperature(self, temperature: float) -> None:
        """Raise `IncompatibleError` where it is known before it is built that it cannot answer at `temperature`."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` for a prompt that its settings alone, before anything is built, leave without an answer."""

    def check_scorer(self, home: torch.device) -> None:
        """Raise `IncompatibleError` when its settings keep it from answering while a text is being written; `home` is
        the student's device."""

    @abstractmethod
    def build(self, context: Context, student: Student) -> LiveTeacher:
        """Load the teacher, or make it from the student."""
