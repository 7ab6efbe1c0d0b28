"""Prompts written in the recipe itself, or passed from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from opd.prompts.base import Prompts


class InlinePrompts(Prompts):
    """A list of strings or of rows."""

    kind: Literal["inline"] = "inline"
    prompts: list[str | dict[str, Any]]

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        rows = []
        for i, item in enumerate(self.prompts):
            fields = {self.column: item} if isinstance(item, str) else item
            rows.append((f"prompts[{i}]", {"id": f"inline-{i}", **fields}))
        return rows
