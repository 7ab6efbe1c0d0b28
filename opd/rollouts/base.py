"""Rollouts: who extends the prompts, that is, on whose states the student learns."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from pydantic import Field, model_validator

from opd.choice import Choice, Settings, kind_of
from opd.context import Context
from opd.errors import RESUME, IncompatibleError, RunError
from opd.planning import Shape
from opd.prompts import Prompt
from opd.rollouts.request import Request, S
from opd.schedules import OverSteps, extremes
from opd.trajectories import Author, Trajectories, join

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher

C = TypeVar("C", bound="Rollout")


class PrefixSource(ABC, Generic[S]):
    """A built rollout, of the settings `S` that its requests bring: the settings and facts of a step come with each
    request; what is built keeps none of them.

    Attributes:
        authors: who may have chosen an action.
        current: what the student writes, it writes now; False where an earlier student did.
        draws: whether the student's actions are draws from its distribution; False where they are its likeliest.
        drafts: whether its positions are the slots of blocks that a drafter proposed.
        dtype: what the sampler computes in.
        stale: steps by which the weights that the student writes with may lie behind those that learn from it.
        elsewhere: whether another program writes: all processes must ask it equally often, and its rounding may be far
            off at single tokens.
        ahead: whether it can write what it is told to `begin` while the run does something else.
    """

    authors: frozenset[Author] = frozenset({"student"})
    current: bool = True
    draws: bool = True
    drafts: bool = False
    dtype: torch.dtype = torch.float32
    stale: int = 0
    ahead: bool = False
    elsewhere: bool = False

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know before the first step."""
        return ()

    @abstractmethod
    def __call__(self, request: Request[S]) -> Trajectories:
        """The trajectories that `request` asks for: those of one prompt next to each other, in the order of prompts."""

    @property
    def learners(self) -> frozenset[Author]:
        """The authors whose positions can be learnt from: all but the environment."""
        return self.authors - {"environment"}

    def exact(self, settings: S) -> bool:
        """Whether under these settings actions are drawn from the student's whole distribution, up to the rounding of
        `dtype`."""
        return True

    def held_out(self, settings: S, context: Context, student: Student) -> HeldOutSampler:
        """Who writes when the student is measured, whoever writes what it trains on: by default the student alone, as
        its policy samples."""
        return student.own_sampler(context)

    def begin(self, request: Request[S]) -> None:
        """Start on what this process will be asked for next, from the weights as they are now, where `ahead`. Asked for
        something else it forgets that. All processes call."""

    def failures(self) -> Mapping[str, int]:
        """How often trajectories were lost, by reason."""
        return {}

    def learn(self, settings: S, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Who helps the student to write learns from what was written for this step, before the student moves. All
        processes call."""

    def beside(self) -> Mapping[str, Callable[[Path], None]]:
        """What learnt so: what writes each to a folder, by the folder's name in the run."""
        return {}

    def own_signals(self) -> Mapping[str, float]:
        """What it measured of how it wrote since it was last asked; logged as train/NAME."""
        return {}

    def close(self) -> None:
        """The run is over."""

    def drawn(self, request: Request[S]) -> None:
        """Told of all prompts of a step, those of every process, before it is asked for this process's share."""

    def written_before(self, prompts: Sequence[Prompt], budget: int) -> Trajectories | None:
        """What an earlier student wrote for those of `prompts` that are known, to measure how far this one moved."""
        return None

    def teachers(self) -> list[str]:
        """Hashes of the teachers that wrote trajectories before this run."""
        return []

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` for a prompt that this source cannot extend."""

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        """Raise `ModelError` where a prompt with a completion of `budget`, the longest of a run, is more than whoever
        writes takes."""

    def writers(self) -> list[PrefixSource]:
        """The sources in this one that draw from a language model."""
        return []

    def check_draws(self, prompts: Sequence[Prompt], context: Context) -> None:
        """Raise `SelfTestError` when a writer's log-probabilities are not those of the model that it draws from."""


@dataclass(frozen=True)
class HeldOutSampler:
    """Who writes held-out trajectories, with the settings and facts that go into every request."""

    source: PrefixSource
    settings: Settings
    context: Context

    def __call__(self, prompts: Sequence[Prompt], group: int, budget: int, stream: int) -> Trajectories:
        """Those that were not lost.

        Raises:
            RunError: all were.
        """
        found = self.source(Request(prompts, group, budget, stream, self.settings, self.context)).written()
        if prompts and not len(found):
            told = ", ".join(f"{reason}: {count}" for reason, count in self.source.failures().items())
            raise RunError(f"no held-out rollout could be written ({told}); mend it and go on with {RESUME}")
        return found

    def changed(self, **values: float) -> HeldOutSampler:
        """The same writer under other settings.

        Raises:
            IncompatibleError: a setting that its rollout does not have.
        """
        lacking = next((name for name in values if name not in type(self.settings).model_fields), None)
        if lacking is not None:
            kind = self.settings.model_dump().get("kind", type(self.settings).__name__)
            raise IncompatibleError(
                f"held-out trajectories are to be drawn with {lacking}={values[lacking]:g}, and {kind!r}, which writes "
                f"them, has no {lacking!r}; leave evaluation.{lacking} and evaluation.greedy out"
            )
        return replace(self, settings=self.settings.model_copy(update=values))


def divided(shares: Sequence[tuple[PrefixSource, Rollout, Sequence[int]]], request: Request[S]) -> Trajectories:
    """One batch from several sources, each with its settings and the indices of the prompts that it extends: all are
    shared out, and the trajectories come in the order of the request's prompts."""
    parts, order = [], []
    for source, settings, mine in shares:
        if mine:
            parts.append(source(request.to(settings, mine, min(request.budget, settings.budget))))
            order += [i * request.group + g for i in mine for g in range(request.group)]
    return join(parts, order)


class Combination(PrefixSource[C]):
    """Base of built sources that are made of others, in the order of their settings."""

    def __init__(self, sources: Sequence[PrefixSource]):
        self.sources = sources
        self.authors = frozenset[Author]().union(*(source.authors for source in sources))
        self.current = all(source.current for source in sources)
        self.draws = all(source.draws for source in sources)
        self.drafts = all(source.drafts for source in sources)
        self.stale = max((source.stale for source in sources), default=0)
        self.elsewhere = any(source.elsewhere for source in sources)

    @property
    def notes(self) -> Sequence[str]:
        return [note for source in self.sources for note in source.notes]

    def failures(self) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        for source in self.sources:
            counts.update(source.failures())
        return counts

    def learn(self, settings: C, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for source, part in zip(self.sources, settings.parts, strict=True):
            source.learn(part, sum_over_processes)

    def beside(self) -> Mapping[str, Callable[[Path], None]]:
        return {name: write for source in self.sources for name, write in source.beside().items()}

    def own_signals(self) -> Mapping[str, float]:
        return {name: value for source in self.sources for name, value in source.own_signals().items()}

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def exact(self, settings: C) -> bool:
        return False

    def held_out(self, settings: C, context: Context, student: Student) -> HeldOutSampler:
        """That of the first part in which the student alone writes, with its cuts; else that of the first part."""
        pairs = list(zip(self.sources, settings.parts, strict=True))
        source, part = next((pair for pair in pairs if pair[0].learners == {"student"} and pair[0].current), pairs[0])
        return source.held_out(part, context, student)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for source in self.sources:
            source.check_prompts(prompts)

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        for source in self.sources:
            source.check_lengths(prompts, budget)

    def teachers(self) -> list[str]:
        return [name for source in self.sources for name in source.teachers()]

    def writers(self) -> list[PrefixSource]:
        return [writer for source in self.sources for writer in source.writers()]


class Sampling(Protocol):
    """How a language model samples, as far as its memory goes."""

    @property
    def batch(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    def scorers(self, teachers: Sequence[tuple[str | None, Sequence[Shape]]]) -> Sequence[Shape]:
        """Which models score the rows while they are written, one of them each row; `teachers` with their names."""


class Rollout(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "rollout"
    turnwise: ClassVar[bool] = False
    """Whether a row comes to several trajectories, the turns of an episode (`Trajectories.episodes`)."""

    @property
    def parts(self) -> list[Rollout]:
        """The rollouts that this one is made of."""
        return [value for _, value in self if isinstance(value, Rollout)]

    @property
    def rewards(self) -> bool:
        """Whether its trajectories come with rewards, as those of an environment do."""
        return bool(self.parts) and all(part.rewards for part in self.parts)

    @property
    @abstractmethod
    def budget(self) -> int:
        """Most actions of one trajectory, unless the curriculum says less."""

    @property
    def most_turns(self) -> int:
        """Most trajectories that a row comes to, times the group."""
        return 1

    @property
    def most_read(self) -> int | None:
        """Most tokens before an action; None where it is the longest prompt."""
        return None

    @property
    def alike(self) -> bool:
        """Whether all trajectories of a prompt are one: nothing is drawn."""
        return bool(self.parts) and all(part.alike for part in self.parts)

    @property
    def from_store(self) -> bool:
        """Whether all its trajectories are rows of a store, about which a teacher was asked before."""
        return bool(self.parts) and all(part.from_store for part in self.parts)

    def files(self, prompt: Prompt) -> list[Path]:
        """Files that a row names and that are read during training."""
        return [path for part in self.parts for path in part.files(prompt)]

    @property
    def longest(self) -> int:
        """The largest budget of all steps."""
        return self.budget

    @property
    def sampled(self) -> int:
        """Most actions that models draw for one trajectory; 0 where it is written already."""
        return max((part.sampled for part in self.parts), default=self.budget)

    def samplers(
        self, student: Shape, teachers: Sequence[tuple[str | None, Sequence[Shape]]]
    ) -> Iterator[tuple[Sampling, Shape]]:
        """Which models write, and how, for a plan; `teachers` with their names."""
        for part in self.parts:
            yield from part.samplers(student, teachers)

    def check_teacher(self, names: Sequence[str | None]) -> None:
        """Raise `IncompatibleError` where it names a teacher that is none of `names`."""
        for part in self.parts:
            part.check_teacher(names)

    @abstractmethod
    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> PrefixSource:
        """Make the rollout of a built student and built teachers."""


class OneSource(Rollout):
    """Base of rollouts that extend prompts themselves."""

    max_new_tokens: Annotated[int, OverSteps(ge=1, le=10_000_000)] = Field(
        256, description="Longest completion, the end token included"
    )

    @property
    def budget(self) -> int:
        return self.max_new_tokens

    @property
    def longest(self) -> int:
        return round(extremes(self.max_new_tokens)[1])


class SeveralSources(Rollout):
    """Base of rollouts that are made of others."""

    @model_validator(mode="after")
    def _whole_rows(self) -> Self:
        for part in self.parts:
            if part.turnwise:
                raise ValueError(
                    f"a {kind_of(part)} gives several trajectories of a prompt, one a turn, and the parts of a "
                    f"{kind_of(self)} one each; make it the whole rollout"
                )
        return self

    @model_validator(mode="after")
    def _nothing_ahead(self) -> Self:
        if any(getattr(getattr(part, "engine", None), "overlap", False) for part in self.parts):
            kind = self.model_dump()["kind"]
            raise ValueError(
                f"engine.overlap: the parts of a {kind} write one after the other and nothing ahead; leave overlap out"
            )
        return self

    @property
    def budget(self) -> int:
        return max(part.budget for part in self.parts)

    @property
    def longest(self) -> int:
        return max(part.longest for part in self.parts)


def row_seed(seed: int, stream: int, prompt: Prompt, group: int, member: int, begun: int = 0) -> int:
    """63-bit seed of one of the `group` rows of a prompt, the same whatever batch it is sampled in. One that goes on
    behind so many actions that are `begun` has another: the draws that wrote those depend on theirs."""
    name = f"{seed}/{stream}/{prompt.id}/{prompt.repeat * group + member}" + (f"/{begun}" if begun else "")
    text = name.encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
