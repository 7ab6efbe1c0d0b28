"""Prompts: rows with an id, and what is checked of them before anything heavy loads."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from opd.choice import Choice, kind_of, names_a_place
from opd.errors import DataError, nearest
from opd.prompts.messages import Messages, answers, check_fields, check_messages, check_turns, check_view, text_of


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
        made: columns that stand in no file and no row that somebody wrote, but were made when it was read.
    """

    id: str
    fields: dict[str, Any] = field(repr=False)
    column: str = "prompt"
    where: str = ""
    repeat: int = 0
    source: int = 0
    weight: float | None = None
    folder: Path | None = None
    made: frozenset[str] = frozenset()

    @property
    def columns(self) -> list[str]:
        """Those that somebody wrote, as messages name them."""
        return written_columns(self.fields, self.made)

    def view(self, column: str | None = None) -> str | Messages:
        """The text or messages in `column` (default: the student's)."""
        name = column or self.column
        if name not in self.fields:
            raise DataError(
                f"{self.where}: no column {name!r}{nearest(name, self.columns)}; the row has {self.columns}"
            )
        return self.fields[name]

    def with_column(self, name: str, value: object) -> Prompt:
        """A copy with another column."""
        return replace(self, fields={**self.fields, name: value})


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


def written_columns(fields: dict[str, Any], made: Collection[str] = ()) -> list[str]:
    """The columns of a row that somebody wrote: not those that were `made`, nor an id by number."""
    return sorted(name for name, value in fields.items() if name not in made and not isinstance(value, Numbered))


FILES = (".jsonl", ".txt", ".csv", ".parquet")
"""Endings of files of prompts."""
CHAT = "messages"
"""Column of chats that is taken where a row has no other prompt."""


class Prompts(Choice):
    """Base of the axis: where prompts come from."""

    axis: ClassVar[str] = "prompts"
    column: str = Field(
        "prompt",
        description="Column that holds the prompt: a string or a list of messages. Rows without a column prompt may "
        "have messages instead",
    )
    answer: str | None = Field(None, description="Column that holds the reference answer for the verifier")
    last_answer: Literal["cut", "refuse"] = Field(
        "cut",
        description="Messages that end with the model's answer: cut the answer off and offer it as the column "
        "'response', unless the row has one, or refuse the row",
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

    @classmethod
    def shorthand(cls, value: object) -> dict[str, Any] | None:
        """A file by its ending, or else a data set: a folder, or a name on the hub."""
        if not isinstance(value, str) or not names_a_place(value):
            return None
        path = Path(value).expanduser()
        a_file = not path.is_dir() and (path.suffix != "" or path.is_file())
        return {"kind": "file" if a_file else "dataset", "path": value}

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
        taken, made = self._taken(fields), set()
        for key, column in (("column", taken), ("answer", self.answer)):
            if column is not None and column not in fields:
                own = written_columns(fields)
                for other in own:
                    check_turns(fields[other], where, other)
                raise DataError(
                    f"{where}: no column {column!r}{nearest(column, own)}; the row has {own}. Name the one that holds "
                    f"the {'prompt' if key == 'column' else key} with prompts.{key}"
                )
        if self.answer is not None and self.answer != "answer":
            if "answer" not in fields:
                made.add("answer")
            fields = {**fields, "answer": fields[self.answer]}
        check_fields(fields, where)
        if taken == CHAT:
            fields = {**fields, taken: _read(fields[taken])}
        if self.last_answer == "cut" and not isinstance(fields[taken], str):
            messages = check_messages(fields[taken], where, taken)
            if answers(messages) and answers(messages[:-1]):
                raise DataError(
                    f"{where}: the messages in column {taken!r} end with two answers, and one is cut off; end them "
                    "with a question before the last answer"
                )
            if answers(messages):
                response = text_of(messages[-1].get("content"))
                fields = {**fields, taken: messages[:-1]}
                if fields.get("response") is None and response.strip():
                    fields["response"] = response
                    made.add("response")
        check_view(fields[taken], where, taken)
        name = fields.get("id")
        return Prompt(
            where if name is None else str(name),
            fields,
            taken,
            where,
            weight=self.weight,
            folder=self.folder,
            made=frozenset(made),
        )

    def _taken(self, fields: dict[str, Any]) -> str:
        """The column that holds a row's prompt."""
        usual = type(self).model_fields["column"].default
        return CHAT if self.column == usual and usual not in fields and CHAT in fields else self.column


def _read(value: Any) -> Any:
    """Messages that a table holds as JSON in a text; any other text is a prompt as it stands."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def load_prompts(sources: Sequence[Prompts], bad: list[DataError] | None = None, key: str = "prompts") -> list[Prompt]:
    """All prompts of all sources, in order; refuses an empty set and duplicate ids. `key` is the recipe's for them.

    With `bad`, a row that cannot be used (the second one of an id, too) is left out, and its error put there.
    """
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        raise DataError(f"{key}.{weighted.index(False)} has no weight and others have; give every source one, or none")
    prompts = [replace(prompt, source=i) for i, source in enumerate(sources) for prompt in source.load(bad)]
    if not prompts:
        named = ", ".join(str(getattr(source, "path", kind_of(source))) for source in sources)
        reason = f"{key}: no row can be used; the first: {bad[0]}" if bad else f"{key}: {named} holds no rows"
        raise DataError(f"{reason}; name a source that holds at least one prompt")
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        numbered = isinstance(prompt.fields.get("id"), Numbered)
        if numbered and prompt.id in seen and prompt.source != seen[prompt.id].source:
            # Rows of two sources of one name are numbered alike; their places tell them apart, or their sources.
            prompt = replace(prompt, id=prompt.where if prompt.where not in seen else f"{prompt.source}/{prompt.id}")
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
