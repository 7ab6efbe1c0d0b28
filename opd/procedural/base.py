"""What every procedural task shares: splits, drawing, reference completions, and the check of their steps."""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, field_validator

from opd.choice import Choice, kind_of
from opd.errors import DataError, nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

ANSWER_PATTERN = r"^[^#]*#([^#]*)$"
"""For `verifier: exact_match`: what follows the one `#` of a completion. Right for every task of this folder."""


def _ordered(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"a range is [smallest, largest]; {value[0]} is more than {value[1]}")
    return value


Count = Annotated[int, Field(ge=1, le=1000)]
Range = Annotated[
    tuple[Count, Count], BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v), AfterValidator(_ordered)
]
"""`[smallest, largest]`, both included, or one number; drawn uniformly."""

Formats = Annotated[
    dict[str, NonNegativeFloat],
    Field(description="Writings of a scratchpad step and their weights, or one name; {} writes no steps"),
]


@dataclass(frozen=True)
class Example:
    """One row of a task.

    Attributes:
        id: of the problem: the same problem has the same id under every seed, size and setting.
        prompt: the problem; a completion follows it directly.
        response: reference completion: scratchpad, `#`, final answer. The end token is not part of it.
        answer: the right final answer (also where `wrong_answers` put another one into `response`).
        difficulty: what the task counts (digits, operations, ...); the scratchpad has one more step for each.
    """

    id: str
    prompt: str
    response: str
    answer: str
    difficulty: int


class Task(Choice):
    """Base of the axis. A prompt holds its whole problem, so that answers and steps follow from texts alone."""

    axis: ClassVar[str] = "task"
    symbols: ClassVar[tuple[str, ...]]
    """Every symbol that a prompt or a completion can hold: characters, or words when `words`."""
    words: ClassVar[bool] = False
    """Symbols are words between blanks rather than single characters."""
    writings: ClassVar[tuple[str, ...]]
    """Names of the legal writings of one step, in the order of `steps`."""

    formats: Formats
    formats_per: Literal["step", "row"] = Field("step", description="Draw the writing for each step, or once a row")
    wrong_answers: float = Field(
        0.0, ge=0, le=1, description="Share of reference completions with a wrong final answer, for imperfect teachers"
    )

    @field_validator("formats", mode="before")
    @classmethod
    def _known_writings(cls, value: Any) -> Any:
        weights = {value: 1.0} if isinstance(value, str) else value
        for name in weights if isinstance(weights, dict) else ():
            if name not in cls.writings:
                close = nearest(str(name), cls.writings)
                raise ValueError(f"no writing {name!r}{close}; accepted: {', '.join(cls.writings)}")
        return weights

    @field_validator("formats")
    @classmethod
    def _some_weight(cls, value: dict[str, float]) -> dict[str, float]:
        if value and not any(value.values()):
            raise ValueError("all weights are 0; give one writing a weight, or {} for no steps")
        return value

    @abstractmethod
    def draw(self, rng: random.Random) -> str:
        """A prompt of a random problem."""

    @abstractmethod
    def answer(self, prompt: str) -> str:
        """The right final answer."""

    @abstractmethod
    def difficulty(self, prompt: str) -> int:
        """See `Example.difficulty`."""

    @abstractmethod
    def steps(self, prompt: str) -> Sequence[tuple[str, ...]]:
        """The right scratchpad, step by step: every legal writing of the step, in the order of `writings`."""

    def examples(self, size: int, seed: int = 0, split: Split = "train") -> list[Example]:
        """`size` different problems of one split; fewer of the same seed are the first of more.

        A problem's split is decided by a hash of its prompt alone (8 : 1 : 1), so no problem is in two splits,
        whatever the settings, seeds and sizes.

        Raises:
            DataError: the split has too few problems.
        """
        kind, rng, found, misses = kind_of(self), random.Random(f"{kind_of(self)} {seed}"), dict[str, Example](), 0
        while len(found) < size:
            prompt = self.draw(rng)
            if prompt in found or split_of(prompt) != split:
                misses += 1
                # A split holds a tenth of all problems or more: so many draws in vain mean that hardly any are left.
                if misses > 1000 + 50 * len(found):
                    raise DataError(
                        f"prompts.size is {size} and split {split!r} of task {kind!r} has about {len(found)} problems "
                        "under these settings; ask for fewer, or allow longer problems"
                    )
                continue
            misses = 0
            digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
            own = random.Random(f"{kind} {seed} {prompt}")
            found[prompt] = Example(
                id=f"{kind}-{digest}",
                prompt=prompt,
                response=self._response(prompt, own),
                answer=self.answer(prompt),
                difficulty=self.difficulty(prompt),
            )
        return list(found.values())

    def first_wrong_step(self, prompt: str, completion: str) -> int | None:
        """Index of the first step that is wrong or missing, or None when all of `completion` is right.

        A step is right in any legal writing, whether or not `formats` uses it. The final answer counts as the last
        step. Without `formats`, the answer is the only step.
        """
        steps = self.steps(prompt) if self.formats else []
        scratchpad, mark, given = completion.partition("#")
        *written, rest = (" ".join(part.split()) for part in scratchpad.split(";"))
        for i, legal in enumerate(steps):
            if i >= len(written) or written[i] not in legal:
                return i
        right = mark and not rest and len(written) == len(steps) and given.strip() == self.answer(prompt)
        return None if right else len(steps)

    def _response(self, prompt: str, rng: random.Random) -> str:
        answer = self.answer(prompt)
        if rng.random() < self.wrong_answers:
            answer = self._wrong_answer(answer, rng)
        parts: list[str] = []
        if self.formats:
            steps = self.steps(prompt)
            names, weights = zip(*self.formats.items(), strict=True)
            drawn = rng.choices(names, weights, k=len(steps) if self.formats_per == "step" else 1)
            for i, legal in enumerate(steps):
                parts += [legal[self.writings.index(drawn[i % len(drawn)])], ";"]
        return (" " if self.words else "").join([*parts, "#", answer])

    def _wrong_answer(self, answer: str, rng: random.Random) -> str:
        """The answer of another problem of the task."""
        for _ in range(1000):
            other = self.answer(self.draw(rng))
            if other != answer:
                return other
        raise DataError(
            f"wrong_answers: every problem of task {kind_of(self)!r} has the answer {answer!r}; set it to 0"
        )


def split_of(prompt: str) -> Split:
    """The split of a problem, by a hash of its prompt."""
    tenth = int.from_bytes(hashlib.sha256(f"split {prompt}".encode()).digest()[:8]) % 10
    return "train" if tenth < 8 else SPLITS[tenth - 7]


def symbols_of(tasks: Sequence[type[Task]]) -> tuple[tuple[str, ...], bool]:
    """`(symbols, whether they are words)` of several tasks together, sorted."""
    if len({task.words for task in tasks}) > 1:
        kinds = ", ".join(f"{t.model_fields['kind'].default} ({'words' if t.words else 'characters'})" for t in tasks)
        raise DataError(f"one tokenizer cannot serve tasks of characters and of words: {kinds}")
    return tuple(sorted({symbol for task in tasks for symbol in task.symbols})), tasks[0].words
