"""Prompts written in the recipe itself, or passed from Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, field_serializer, field_validator

from opd.prompts.base import Numbered, Prompts


class InlinePrompts(Prompts):
    """A list of strings or of rows. Rows from Python may hold images too: uint8 arrays, PIL images or encoded bytes. Of
    those recipe.yaml has the hash."""

    kind: Literal["inline"] = "inline"
    prompts: list[str | dict[str, Any]] = Field(description="Texts, or rows as a file has them")

    @field_validator("prompts", mode="before")
    @classmethod
    def _rows(cls, value: object) -> object:
        for i, row in enumerate(value if isinstance(value, list) else ()):
            if not isinstance(row, str | dict):
                raise ValueError(f"item {i} is {row!r:.40}, and a prompt is a text or a row {{column: value, ...}}")
        return value

    @field_validator("prompts")
    @classmethod
    def _plain(cls, value: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for i, row in enumerate(value):
            try:
                json.dumps(row, default=_refuse_all_but_images)
            except TypeError as error:
                raise ValueError(
                    f"prompts[{i}] holds what a row cannot ({error}); give texts, numbers and lists, of an image the "
                    "path of its file, uint8 [H, W, 3] or a PIL image"
                ) from None
        return value

    @field_serializer("prompts", when_used="json")
    def _written(self, value: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        return [_without_images(row) for row in value]

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        rows = []
        for i, item in enumerate(self.prompts):
            fields = {self.column: item} if isinstance(item, str) else item
            rows.append((f"prompts[{i}]", {"id": Numbered(f"inline-{i}"), **fields}))
        return rows


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image | bytes) or (isinstance(value, np.ndarray) and value.dtype == np.uint8)


def _refuse_all_but_images(value: Any) -> str:
    if not _is_image(value):
        kind = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"a {kind} is neither JSON nor an image")
    return ""


def _without_images(value: Any) -> Any:
    """The same with a text for each image, which tells it from others."""
    if isinstance(value, dict):
        return {key: _without_images(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_images(part) for part in value]
    if not _is_image(value):
        return value
    try:
        shape = b"" if isinstance(value, bytes) else str(np.shape(value)).encode()
        content = value if isinstance(value, bytes) else value.tobytes()
    except Exception:
        # What a damaged file makes a decoder raise is not to be foreseen. Whoever opens the picture names its row.
        return "(passed from Python, cannot be read)"
    return f"(passed from Python, sha256 {hashlib.sha256(shape + content).hexdigest()[:16]})"
