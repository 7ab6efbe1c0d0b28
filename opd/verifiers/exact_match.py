"""Exact match with the reference answer."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from opd.prompts import Prompt
from opd.verifiers.base import CompletionVerifier, as_text


class ExactMatch(CompletionVerifier):
    """1 when the completion, stripped, equals the row's `answer`; `pattern` takes its last first group instead."""

    kind: Literal["exact_match"] = "exact_match"
    modality: ClassVar[str | None] = "language"
    reads: ClassVar[str | None] = "answer"
    pattern: str | None = Field(
        None,
        description="Regular expression with one group, whose last match is the answer; default the whole completion",
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            if groups != 1:
                raise ValueError("needs exactly one group, around the answer")
        return value

    def score(self, prompt: Prompt, completion: str) -> float | None:
        if not self.judges(prompt):
            return None
        given = completion.strip()
        if self.pattern is not None:
            found = re.findall(self.pattern, completion)
            given = found[-1].strip() if found else ""
        return float(given == as_text(prompt.fields["answer"]).strip())
