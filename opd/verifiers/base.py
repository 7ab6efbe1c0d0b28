"""Verifiers: an exact outcome for a completion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, ClassVar

import torch

from opd.choice import Choice
from opd.context import Context
from opd.errors import DataError, nearest
from opd.prompts import Prompt
from opd.trajectories import Outcome, Trajectories

TEXTS = ("answer", "text")
"""Columns that verifiers read as one text."""
READABLE = (str, int, float, Decimal)
"""Types of a value that stand for one text."""
LARGEST = 2**53
"""Beyond it floats do not tell neighbouring whole numbers apart."""


def as_text(value: object) -> str:
    """A text or number of a row as verifiers compare it: whole numbers without a point, whatever their type."""
    if isinstance(value, float | Decimal) and -LARGEST < value < LARGEST and value == int(value):
        return str(int(value))
    return str(value)


class Scorer(ABC):
    """A built verifier."""

    def __init__(self, settings: Verifier):
        self.settings = settings

    @abstractmethod
    def score(self, trajectories: Trajectories, outcomes: Sequence[Outcome]) -> torch.Tensor:
        """Rewards in [0, 1], float32 `[B]` on the CPU; NaN for a trajectory without a verdict, which then counts in no
        average.

        Args:
            trajectories: B of them; rewards that the rollout set itself are in them.
            outcomes: what the student's policy makes of each: a text, or float32 `[H, W, 3]` in 0..1.
        """

    @property
    def notes(self) -> Sequence[str]:
        """Lines that a person must see before a run, as by what programs of a model are confined."""
        return []

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What the last `score` found beside rewards, on all processes, which must all ask; logged as train/NAME."""
        return {}

    def measure(self, trajectories: Trajectories, outcomes: Sequence[Outcome]) -> dict[str, torch.Tensor]:
        """What held-out measurements say of outcomes beside their rewards: float32 `[B]` by each name of
        `Verifier.measured`, NaN where there is no verdict."""
        return {}

    def shown(self, prompt: Prompt, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a logged row of this prompt gets besides, for a layer of the report; the row holds the `completion` as
        text where it is one."""
        return {}

    def judges(self, prompt: Prompt) -> bool:
        """Whether there are verdicts on trajectories of this prompt."""
        return self.settings.judges(prompt)

    def check_verdicts(self, prompts: Sequence[Prompt], learner: str) -> None:
        """Raise `DataError` when none of the prompts has a verdict, so that `learner` would have no gradient."""
        if any(self.judges(prompt) for prompt in prompts):
            return
        reads = self.settings.reads
        columns = sorted({name for prompt in prompts for name in prompt.columns})
        close = nearest(reads, [c for c in columns if c != reads]) if reads is not None else ""
        raise DataError(
            f"verifier {type(self.settings).model_fields['kind'].default!r} gives a verdict on none of the "
            f"{len(prompts)} training prompts, and {learner} learns from verdicts: it needs {self.settings.needs}, and "
            f"their columns are {columns}{close}. Give the rows that column, or take another verifier"
        )


class OneByOne(Scorer):
    """Base of built verifiers that look at one prompt and its completion, and at nothing else."""

    @abstractmethod
    def verdict(self, prompt: Prompt, completion: Any) -> float | None:
        """Reward in [0, 1], or None when this prompt has no verifiable answer."""

    def score(self, trajectories: Trajectories, outcomes: Sequence[Outcome]) -> torch.Tensor:
        verdicts = [self.verdict(*pair) for pair in zip(trajectories.prompts, outcomes, strict=True)]
        return torch.tensor([float("nan") if verdict is None else verdict for verdict in verdicts], dtype=torch.float32)


class Verifier(Choice):
    """Base of the axis."""

    axis: ClassVar[str] = "verifier"
    reads: ClassVar[str | None] = None
    """Column without which a prompt has no verdict; None where that is not up to one column."""

    @classmethod
    def shorthand(cls, value: object) -> dict[str, Any] | None:
        """A function, from Python."""
        return {"kind": "function", "call": value} if callable(value) and not isinstance(value, type) else None

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of what its `Scorer.measure` says of outcomes."""
        return ()

    @abstractmethod
    def build(self, context: Context) -> Scorer:
        """Make what scores; processes and models belong to it."""

    def check_machine(self) -> None:
        """Raise `OpdError` for what this machine lacks; asked before anything heavy loads."""
        return

    def judges(self, prompt: Prompt) -> bool:
        """Whether there are verdicts on trajectories of this prompt, as far as the settings know."""
        if self.reads is None:
            return True
        value = prompt.fields.get(self.reads)
        # An empty cell, or the NaN of one, is no answer: a completion in which none is found would be right by it.
        return value is not None and (bool(value.strip()) if isinstance(value, str) else value == value)

    @property
    def needs(self) -> str:
        """What a prompt must have for a verdict, as messages name it."""
        return f"the column {self.reads!r}"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` for a prompt whose columns could not be read; one without a verdict is none."""
        for prompt in prompts:
            value = prompt.fields.get(self.reads) if self.reads in TEXTS else None
            if value is not None and not isinstance(value, READABLE):
                raise DataError(
                    f"{prompt.where or prompt.id}: column {self.reads!r} holds {type(value).__name__}; a verifier "
                    "reads a text or a number there"
                )


class CompletionVerifier(Verifier):
    """Base of verifiers that look at one prompt and its completion and keep nothing: they are one method."""

    @abstractmethod
    def score(self, prompt: Prompt, completion: Any) -> float | None:
        """Reward in [0, 1], or None when this prompt has no verifiable answer (it then counts in no average).

        `completion` is what the student's policy makes of a trajectory: a text, or float32 `[H, W, 3]` in 0..1.
        """

    def build(self, context: Context) -> Scorer:
        return _BySettings(self)


class _BySettings(OneByOne):
    """What a `CompletionVerifier` builds."""

    settings: CompletionVerifier

    def verdict(self, prompt: Prompt, completion: Any) -> float | None:
        return self.settings.score(prompt, completion)
