"""What a teacher of language is shown before a prompt that its student is not: a system text, and examples."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from opd.choice import Settings
from opd.errors import DataError, IncompatibleError
from opd.language.engines.in_process import InProcess
from opd.prompts import Prompt
from opd.prompts.file import FilePrompts
from opd.prompts.messages import Messages, check_view, text_of
from opd.teachers.base import Teacher

SHOWN = "(what the teacher is shown)"
"""Column of its view, in a copy of the row."""
MOST_EXAMPLES = 256
"""A file with more is prompts, and not a few examples before each of them."""


class Example(Settings):
    """A prompt, and how it is answered."""

    prompt: str = Field(description="What the user says")
    response: str = Field(description="What the model answers")


class ShowingTeacher(Teacher):
    """Base of teachers that may be shown more than the student, without a column for it.

    A teacher of the student's own weights with `system` or `examples` is context distillation (Snell et al. 2022): the
    student learns to answer as if it had read them.
    """

    system: str | None = Field(
        None, description="System text of this teacher's view alone; a row's own system message follows it"
    )
    examples: list[Example] = Field(
        [],
        max_length=MOST_EXAMPLES,
        description="Turns before the prompt, in this teacher's view alone: [{prompt: ..., response: ...}], or a file "
        "with these columns (or with messages), which is read into the recipe",
    )

    @field_validator("examples", mode="before")
    @classmethod
    def _of_a_file(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        try:
            source = FilePrompts.model_validate({"path": value, "last_answer": "cut"}, context=info.context)
            rows = source.load()
            return [{"prompt": _asked(row), "response": _answered(row)} for row in rows]
        except DataError as error:
            raise ValueError(str(error)) from None

    @property
    def shows(self) -> bool:
        """Whether its view has more than a column of the row."""
        return self.system is not None or bool(self.examples)

    @property
    def shown_hash(self) -> str | None:
        """By which stored answers under this view are told from others; None where it shows nothing of its own."""
        if not self.shows:
            return None
        plain = [self.system, *([each.prompt, each.response] for each in self.examples)]
        return "sha256:" + hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]

    def view(self, prompt: Prompt) -> tuple[Prompt, str | None]:
        if not self.shows:
            return super().view(prompt)
        column = self.sees or prompt.column
        asked = check_view(prompt.view(column), prompt.where, column)
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        before: Messages = []
        if self.system is not None:
            own = turns.pop(0) if turns[0].get("role") == "system" else None
            told = [self.system] if own is None else [self.system, text_of(own.get("content"))]
            before.append({"role": "system", "content": "\n\n".join(told)})
        elif self.examples and turns[0].get("role") == "system":
            before.append(turns.pop(0))
        for each in self.examples:
            before += [{"role": "user", "content": each.prompt}, {"role": "assistant", "content": each.response}]
        return prompt.with_column(SHOWN, [*before, *turns]), SHOWN

    def check_shown(self, language: InProcess) -> None:
        """Raise `IncompatibleError` where the model that reads it has no turns to write a system text and examples as,
        or reads pictures too."""
        if not self.shows:
            return
        key = "system" if self.system is not None else "examples"
        if language.reads_pictures:
            raise IncompatibleError(
                f"teacher.{key} is for models that read text alone; give the rows a column with the whole view, and "
                "name it in teacher.sees"
            )
        if language.template != "chat":
            raise IncompatibleError(
                f"teacher.{key} is written by a chat template, and {language.owner} has template: plain; give the rows "
                "a column with the whole text, and name it in teacher.sees"
            )


def _asked(row: Prompt) -> str:
    view = row.view()
    if isinstance(view, str):
        return view
    if len(view) > 1 or view[0].get("role") != "user":
        raise DataError(
            f"{row.where}: an example is one question and its answer, and this row has {len(view)} messages before the "
            "last answer; shorten it"
        )
    return text_of(view[0].get("content"))


def _answered(row: Prompt) -> str:
    response = row.fields.get("response")
    if not isinstance(response, str) or not response.strip():
        raise DataError(f"{row.where}: an example needs its answer, a text in the column 'response'")
    return response
