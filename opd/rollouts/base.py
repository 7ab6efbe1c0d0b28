"""Rollouts: who extends the prompts, that is, on whose states the student learns."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field

from opd.choice import Choice
from opd.context import Context
from opd.planning import Shape
from opd.prompts import Prompt
from opd.schedules import OverSteps, Scheduled
from opd.trajectories import Author, Trajectories, join


class PrefixSource(ABC):
    """A built rollout.

    Attributes:
        settings: those of the current step, as `take` put them there.
        authors: who may have chosen an action.
        current: what the student writes, it writes now; False where an earlier student did.
        exact: actions are drawn from the student's whole distribution, up to the rounding of `dtype`.
        dtype: what the sampler computes in.
    """

    settings: Any
    context: Context
    authors: frozenset[Author] = frozenset({"student"})
    current: bool = True
    exact: bool = True
    dtype: torch.dtype = torch.float32

    @abstractmethod
    def __call__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        budget: int,
        stream: int,
        begun: Sequence[torch.Tensor] | None = None,
    ) -> Trajectories:
        """`group` trajectories of each prompt, at most `budget` actions long.

        Args:
            prompts: P prompts.
            group: G, trajectories of each.
            budget: most actions of a trajectory, those in `begun` not counted.
            stream: names the random stream (the loop passes the step); the same recipe seed, stream and prompts give
                the same trajectories.
            begun: P * G sequences of actions that another source has written already; they stand before the actions
                drawn here and are not part of what is returned.
        """

    def take(self, settings: Any, context: Context) -> None:
        """Take the settings and the context of a step, and hand on what parts of this one need."""
        self.settings, self.context = settings, context

    def drawn(self, prompts: Sequence[Prompt], stream: int) -> None:  # noqa: B027
        """Told of all prompts of a step, those of every process, before it is asked for this process's share."""

    def written_before(self, prompts: Sequence[Prompt], budget: int) -> Trajectories | None:
        """What an earlier student wrote for those of `prompts` that are known, to measure how far this one moved."""
        return None

    def teachers(self) -> list[str]:
        """Hashes of the teachers that wrote trajectories before this run."""
        return []

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027
        """Raise `DataError` for a prompt that this source cannot extend."""

    def writers(self) -> list[PrefixSource]:
        """The sources in this one that draw from a language model."""
        return []

    def check_draws(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027
        """Raise `SelfTestError` when a writer's log-probabilities are not those of the model that it draws from."""


def divided(
    shares: Sequence[tuple[PrefixSource, Sequence[int]]],
    prompts: Sequence[Prompt],
    group: int,
    budget: int,
    stream: int,
    begun: Sequence[torch.Tensor] | None,
) -> Trajectories:
    """One batch from several sources: each extends the prompts of its own indices, all of which are shared out, and the
    trajectories come in the order of `prompts`; the other arguments are those of a source."""
    parts, order = [], []
    for source, mine in shares:
        if mine:
            starts = None if begun is None else [begun[i * group + g] for i in mine for g in range(group)]
            least = min(budget, source.settings.budget)
            parts.append(source([prompts[i] for i in mine], group, least, stream, starts))
            order += [i * group + g for i in mine for g in range(group)]
    return join(parts, order)


class Combination(PrefixSource):
    """Base of built sources that are made of others, in the order of their settings."""

    exact = False

    def __init__(self, settings: Any, context: Context, sources: Sequence[PrefixSource]):
        self.settings, self.context, self.sources = settings, context, sources
        self.authors = frozenset[Author]().union(*(source.authors for source in sources))
        self.current = all(source.current for source in sources)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for source in self.sources:
            source.check_prompts(prompts)

    def teachers(self) -> list[str]:
        return [name for source in self.sources for name in source.teachers()]

    def take(self, settings: Any, context: Context) -> None:
        super().take(settings, context)
        for source, part in zip(self.sources, settings.parts, strict=True):
            source.take(part, context)

    def writers(self) -> list[PrefixSource]:
        return [writer for source in self.sources for writer in source.writers()]


class Sampling(Protocol):
    """How a language model samples, as far as its memory goes."""

    @property
    def batch(self) -> int: ...

    @property
    def dtype(self) -> str: ...


class Rollout(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "rollout"

    @property
    def parts(self) -> list[Rollout]:
        """The rollouts that this one is made of."""
        return [value for _, value in self if isinstance(value, Rollout)]

    @property
    @abstractmethod
    def budget(self) -> int:
        """Most actions of one trajectory, unless the curriculum says less."""

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
    def build(self, context: Context, student: Any, teachers: Sequence[Any]) -> PrefixSource:
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
        tokens = self.max_new_tokens
        return round(max(tokens.shape.extremes())) if isinstance(tokens, Scheduled) else tokens


class SeveralSources(Rollout):
    """Base of rollouts that are made of others."""

    @property
    def budget(self) -> int:
        return max(part.budget for part in self.parts)

    @property
    def longest(self) -> int:
        return max(part.longest for part in self.parts)


def row_seed(seed: int, stream: int, prompt: Prompt, group: int, member: int) -> int:
    """63-bit seed of one of the `group` rows of a prompt, the same whatever batch it is sampled in."""
    text = f"{seed}/{stream}/{prompt.id}/{prompt.repeat * group + member}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
