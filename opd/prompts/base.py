"""Prompts: rows with an id, and what is checked of them before anything heavy loads."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from opd.choice import Choice
from opd.errors import DataError, nearest
from opd.prompts.messages import Messages, answers, check_fields, check_messages, check_view, text_of


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt set.

    Attributes:
        id: unique within the run.
        fields: the row's columns as they were read. A view of the prompt (the student's, a teacher's) names a column
            that holds a string or a list of chat messages.
        column: the column that the student sees.
        where: file and row, for error messages.
        repeat: how often the same step has drawn it already.
        source: which of the recipe's prompt sources it stands in, from 0.
        weight: of that source, where it has one.
        folder: where relative paths in the row's columns are looked for after the working directory.
    """

    id: str
    fields: dict[str, Any] = field(repr=False)
    column: str = "prompt"
    where: str = ""
    repeat: int = 0
    source: int = 0
    weight: float | None = None
    folder: Path | None = None

    def view(self, column: str | None = None) -> str | Messages:
        """The text or messages in `column` (default: the student's)."""
        name = column or self.column
        if name not in self.fields:
            raise DataError(
                f"{self.where}: no column {name!r}{nearest(name, self.fields)}; the row has {sorted(self.fields)}"
            )
        return self.fields[name]


def count_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One step's prompts, each with its `repeat`, so that trajectories of one drawn twice are not the same."""
    seen: Counter[str] = Counter()
    counted = []
    for prompt in prompts:
        counted.append(replace(prompt, repeat=seen[prompt.id]) if seen[prompt.id] else prompt)
        seen[prompt.id] += 1
    return counted


class Numbered(str):
    """The id that a source gave a row without one."""


class Prompts(Choice):
    """Base of the axis: where prompts come from."""

    axis: ClassVar[str] = "prompts"
    column: str = Field("prompt", description="Column that holds the prompt: a string or a list of messages")
    answer: str | None = Field(None, description="Column that holds the reference answer for the verifier")
    last_answer: Literal["refuse", "cut"] = Field(
        "refuse",
        description="Messages that end with the model's answer: refuse the row, or cut the answer off and offer it as "
        "the column 'response', unless the row has one",
    )
    limit: int | None = Field(None, ge=1, description="Take only the first rows")
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Of this source among several: its share of the draws is its weight over the sum of all, however "
        "many rows it has; default every row is drawn alike",
    )
    add: dict[str, str] = Field({}, description="Columns that every row gets, e.g. {task: math} to route teachers by")

    @property
    def remote(self) -> str | None:
        """What would have to be downloaded, by name; None where the rows are on this machine."""
        return None

    @abstractmethod
    def rows(self) -> Sequence[tuple[str, dict[str, Any] | DataError]]:
        """`(where, fields)` of every row, or what is wrong with it; `where` names file and row for error messages."""

    @property
    def folder(self) -> Path | None:
        """Of the file that the rows stand in, where it is one."""
        return None

    def load(self, bad: list[DataError] | None = None) -> list[Prompt]:
        """Read and check the rows, each with a non-empty prompt; with `bad`, errors of single rows are put there."""
        prompts = []
        for where, fields in list(self.rows())[: self.limit]:
            try:
                prompts.append(self._prompt(where, fields))
            except DataError as error:
                if bad is None:
                    raise
                bad.append(error)
        return prompts

    def _prompt(self, where: str, fields: dict[str, Any] | DataError) -> Prompt:
        if isinstance(fields, DataError):
            raise fields
        for added, value in self.add.items():
            if fields.get(added, value) != value:
                raise DataError(
                    f"{where}: the row has a column {added!r} of its own, which prompts.add would replace; "
                    "take it out of prompts.add, or name another column"
                )
        fields = {**fields, **self.add}
        for column in (self.column, self.answer):
            if column is not None and column not in fields:
                raise DataError(
                    f"{where}: no column {column!r}{nearest(column, fields)}; the row has {sorted(fields)}. "
                    "Name the right one with prompts.column (or prompts.answer)"
                )
        if self.answer is not None:
            fields = {**fields, "answer": fields[self.answer]}
        check_fields(fields, where)
        if self.last_answer == "cut" and not isinstance(fields[self.column], str):
            messages = check_messages(fields[self.column], where, self.column)
            if answers(messages[:-1]):
                raise DataError(
                    f"{where}: the messages in column {self.column!r} end with two answers, and last_answer: cut takes "
                    "one off; end them with a question before the last answer"
                )
            if answers(messages):
                response = text_of(messages[-1].get("content"))
                fields = {**fields, self.column: messages[:-1]}
                if fields.get("response") is None and response.strip():
                    fields["response"] = response
        check_view(fields[self.column], where, self.column)
        name = fields.get("id")
        return Prompt(
            where if name is None else str(name),
            fields,
            self.column,
            where,
            weight=self.weight,
            folder=self.folder,
        )


def load_prompts(sources: Sequence[Prompts], bad: list[DataError] | None = None) -> list[Prompt]:
    """All prompts of all sources, in order; refuses an empty set and duplicate ids.

    With `bad`, a row that cannot be used (the second one of an id, too) is left out, and its error put there.
    """
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        raise DataError(
            f"prompts.{weighted.index(False)} has no weight and others have; give every source one, or none"
        )
    prompts = [replace(prompt, source=i) for i, source in enumerate(sources) for prompt in source.load(bad)]
    if not prompts:
        reason = f"no row can be used; the first: {bad[0]}" if bad else "the prompt set has no rows"
        raise DataError(f"{reason}; name a source that holds at least one prompt")
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.id in seen and prompt.source != seen[prompt.id].source:
            # Rows of two files of one name are numbered alike; their places tell them apart.
            prompt = replace(prompt, id=prompt.where) if isinstance(prompt.fields.get("id"), Numbered) else prompt
        other = seen.setdefault(prompt.id, prompt)
        if other is not prompt:
            error = DataError(
                f"duplicate prompt id {prompt.id!r} in {other.where} and {prompt.where}; "
                "ids must be unique: mend the column 'id' or remove it"
            )
            if bad is None:
                raise error
            bad.append(error)
    return list(seen.values())


def split_held_out(prompts: list[Prompt], size: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """`(training, held out)`: `size` prompts drawn by `seed`, the order of the rest kept."""
    if len(prompts) == 1:
        raise DataError(
            "the prompt set has one row, and training and held-out prompts are different ones; add rows, or give "
            "evaluation.prompts a set of its own"
        )
    if size >= len(prompts):
        raise DataError(
            f"evaluation.held_out is {size} and the prompt set has {len(prompts)} rows; "
            f"hold out at most {len(prompts) - 1}, or give evaluation.prompts a set of its own"
        )
    chosen = set(random.Random(seed).sample(range(len(prompts)), size))
    return (
        [p for i, p in enumerate(prompts) if i not in chosen],
        [p for i, p in enumerate(prompts) if i in chosen],
    )
