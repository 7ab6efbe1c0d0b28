"""Answers in an asked form: one JSON object."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field

from opd.prompts import Prompt
from opd.verifiers.base import CompletionVerifier


class JsonObject(CompletionVerifier):
    """1 when the completion, stripped, is one JSON object and nothing else; `keys` asks for exactly these keys, each
    with a value that is neither null nor an empty text. What the values say is not looked at."""

    kind: Literal["json_object"] = "json_object"
    modality: ClassVar[str | None] = "language"
    keys: list[str] = Field([], description="Keys that it must have, and no others; default any object")

    def score(self, prompt: Prompt, completion: str) -> float | None:
        try:
            found: Any = json.loads(completion.strip())
        except (ValueError, RecursionError):
            return 0.0
        if not isinstance(found, dict):
            return 0.0
        if not self.keys:
            return 1.0
        filled = all(value is not None and value != "" for value in found.values())
        return float(filled and found.keys() == set(self.keys))
