"""Prompts about a part of a picture: rows with a box, of which student and teacher see different views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from opd.choice import OneOf
from opd.errors import DataError, nearest
from opd.prompts.base import Prompt, Prompts
from opd.prompts.messages import Messages
from opd.prompts.pictures import Limits, corners, size_of

OWN = ("column", "answer", "last_answer", "limit", "weight", "add")
"""What is said of the prompts that come out, and so here and not of the source."""
MADE = ("crop", "whole")
"""Columns that every row gets."""


class BoxedPrompts(Prompts):
    """Rows of another source, whose box says where in their picture the answer is (Vision-OPD).

    The column `image` gets the student's view: the picture with a red frame round the box and a sentence that says so,
    or the picture as it is, or the crop. `crop` is what is in the box, enlarged, for a teacher that `sees: crop` under
    the same text; `whole` is the picture as it is. Pictures are drawn when they are read, and files stay as they are.
    """

    kind: Literal["boxed"] = "boxed"
    of: Annotated[Prompts, OneOf(Prompts, "file")] = Field(description="Where the rows come from")
    view: Literal["boxed", "clean", "crop"] = Field(
        "boxed",
        description="What the student sees: a red frame and the hint, as a training set; the picture as it is without "
        "them, as an evaluation; or the crop, to measure what it hides",
    )
    image: str = Field("image", description="Column with the whole picture")
    box: str = Field("box", description="Column with [left, top, right, bottom]")
    units: Literal["pixels", "share", "thousandths"] = Field(
        "pixels", description="Of the box: of the picture, or parts of its width and height"
    )
    hint: str | None = Field(
        "Consider only what is inside the red box.",
        description="Stands before the question where the frame is drawn; null: the frame says enough",
    )
    scale: float = Field(2.0, gt=0, le=16, description="How many times the crop is enlarged")
    margin: float = Field(0.0, ge=0, le=10, description="Round the crop, as a share of the box's width and height")
    largest: float = Field(
        0.1, gt=0, le=1, description="Share of the picture that a box may have; a row with a larger one is refused"
    )
    line: int | None = Field(
        None, ge=1, le=1000, description="Pixels of the frame's line; default a 250th of the longer side, at least 2"
    )

    @field_validator("of")
    @classmethod
    def _says_where_alone(cls, value: Prompts) -> Prompts:
        for name in OWN:
            if getattr(value, name) != type(value).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name!r} is said of the prompts that come out: set it beside 'of', not within")
        if isinstance(value, BoxedPrompts):
            raise ValueError("the rows of a boxed source have their views already; take its own source")
        return value

    @property
    def remote(self) -> str | None:
        return self.of.remote

    @property
    def folder(self) -> Path | None:
        return self.of.folder

    def rows(self) -> Sequence[tuple[str, dict[str, Any] | DataError]]:
        found: list[tuple[str, dict[str, Any] | DataError]] = []
        for where, fields in list(self.of.rows())[: self.limit]:
            made: dict[str, Any] | DataError = fields
            if not isinstance(fields, DataError):
                try:
                    made = self._viewed(where, fields)
                except DataError as error:
                    made = error
            found.append((where, made))
        return found

    def _viewed(self, where: str, fields: dict[str, Any]) -> dict[str, Any]:
        for column in (self.image, self.box, self.column):
            if fields.get(column) is None:
                lack = f"column {column!r} is empty"
                if column not in fields:
                    lack = f"no column {column!r}{nearest(column, fields)}"
                raise DataError(
                    f"{where}: {lack}; a row of a boxed source has a picture (prompts.image), a box (prompts.box) and "
                    "a question (prompts.column)"
                )
        taken = next((name for name in MADE if name in fields and name != self.image), None)
        if taken is not None:
            raise DataError(
                f"{where}: the row has a column {taken!r} of its own, which the box would replace; rename it"
            )
        picture = fields[self.image]
        if isinstance(picture, list | tuple):
            if len(picture) != 1:
                raise DataError(f"{where}: column {self.image!r} holds {len(picture)} pictures; a box is in one")
            picture = picture[0]
        prompt = Prompt("", fields, where=where, folder=self.folder)
        size = size_of(picture, prompt, self.image, Limits(bytes=2**62, pixels=2**62))
        box = self._box(fields[self.box], size, where)
        area = (box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1])
        if area > self.largest:
            raise DataError(
                f"{where}: the box in column {self.box!r} has {area:.1%} of the picture, more than prompts.largest="
                f"{self.largest:g}; raise it"
            )
        crop = {"picture": picture, "crop": self._widened(box, size), "scale": self.scale}
        views: dict[str, Any] = {
            "boxed": {"picture": picture, "box": box, "width": self.line},
            "clean": picture,
            "crop": crop,
        }
        made = {**fields, self.image: views[self.view], "crop": crop, "whole": picture}
        if self.view == "boxed" and self.hint is not None:
            made[self.column] = _hinted(fields[self.column], self.hint)
        return made

    def _box(self, value: Any, size: tuple[int, int], where: str) -> list[int]:
        told = f"{where}: the picture in column {self.image!r}"
        if self.units == "pixels":
            return list(corners(value, size, told))
        try:
            numbers = np.asarray(value, dtype=float)
        except (TypeError, ValueError):
            numbers = np.zeros(0)
        whole = 1.0 if self.units == "share" else 1000.0
        if numbers.shape != (4,) or not bool(((numbers >= 0) & (numbers <= whole)).all()):
            raise DataError(
                f"{where}: column {self.box!r} holds {value!r}; with units: {self.units} a box is [left, top, right, "
                f"bottom] from 0 to {whole:g}"
            )
        return list(corners((numbers / whole * np.array([*size, *size])).tolist(), size, told))

    def _widened(self, box: Sequence[int], size: tuple[int, int]) -> list[int]:
        """The box with its margin, within the picture."""
        extra = [round(self.margin * (box[2] - box[0])), round(self.margin * (box[3] - box[1]))]
        first = [max(0, box[i] - extra[i]) for i in (0, 1)]
        return first + [min(size[i], box[2 + i] + extra[i]) for i in (0, 1)]


def _hinted(view: str | Messages, hint: str) -> str | Messages:
    """The question with the hint before it; of messages, before the text of the last one that asks."""
    if isinstance(view, str):
        return f"{hint}\n{view}"
    if not isinstance(view, list):
        return view  # whoever reads the row says what is wrong with it
    asks = [i for i, message in enumerate(view) if isinstance(message, dict) and message.get("role") == "user"]
    made = list(view)
    if asks:
        message = made[asks[-1]]
        content = message.get("content")
        if isinstance(content, str):
            made[asks[-1]] = {**message, "content": f"{hint}\n{content}"}
        elif isinstance(content, list):
            places = (i for i, part in enumerate(content) if isinstance(part, dict) and part.get("type") == "text")
            first = next(places, len(content))
            text = {"type": "text", "text": f"{hint}\n"}
            made[asks[-1]] = {**message, "content": [*content[:first], text, *content[first:]]}
    return made
