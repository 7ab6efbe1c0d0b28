"""Prompts written in the recipe itself, or passed from Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from opd.prompts.base import Prompts


class InlinePrompts(Prompts):
    """A list of strings or of rows."""

    kind: Literal["inline"] = "inline"
    prompts: list[str | dict[str, Any]] = Field(description="Texts, or rows as a file has them")

    @field_validator("prompts")
    @classmethod
    def _plain(cls, value: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for i, row in enumerate(value):
            try:
                json.dumps(row)
            except TypeError as error:
                raise ValueError(
                    f"prompts[{i}] holds what a recipe cannot ({error}); give texts, numbers and lists, of an image "
                    "the path of its file"
                ) from None
        return value

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        rows = []
        for i, item in enumerate(self.prompts):
            fields = {self.column: item} if isinstance(item, str) else item
            rows.append((f"prompts[{i}]", {"id": f"inline-{i}", **fields}))
        return rows
