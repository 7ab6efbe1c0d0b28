"""A text to write: `text 4K7`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from opd.drawings.base import Drawing, Row, Split, hashed_split
from opd.drawings.font import CHARACTERS, HEIGHT, WIDTH, character, templates
from opd.drawings.palette import COLOURS, GREYS

LEGIBLE = 0.3
"""Least difference of brightness between ink and paper."""

PAIRS = tuple(
    (ink, paper)
    for ink, paper in itertools.product(COLOURS.values(), GREYS.values())
    if abs(np.dot(np.array(ink, dtype=float) - paper, (0.299, 0.587, 0.114))) >= 255 * LEGIBLE
)


class Glyph(Drawing):
    """Two or three characters of a 5 x 7 font in one row, in or near the middle, in a colour legible on its grey.

    A hash of the text decides the split: no text is in two of them. There is no split `unseen`, since all texts of
    another split are unseen.
    """

    kind: Literal["glyph"] = "glyph"
    symbols: ClassVar = ("text", *CHARACTERS)
    longest: ClassVar = 4

    characters: list[Literal[2, 3]] = Field([2, 3], min_length=1, description="Lengths of a text; at 16 pixels only 2")

    alphabet: str = Field(
        "".join(CHARACTERS), min_length=2, description="Characters that a text is made of; fewer are easier to learn"
    )

    moved: bool = Field(True, description="Move the text by up to two pixels of the font; else it stands in the middle")

    @field_validator("alphabet")
    @classmethod
    def _in_the_font(cls, alphabet: str) -> str:
        strange = "".join(sorted(set(alphabet) - set(CHARACTERS)))
        if strange or len(set(alphabet)) < len(alphabet):
            what = f"not in the font: {strange!r}" if strange else "a character stands there twice"
            raise ValueError(f"{what}; take different characters of {''.join(CHARACTERS)}")
        return alphabet

    @model_validator(mode="after")
    def _fits(self) -> Glyph:
        # The default stays what it is, so that a recipe is valid again when it was written out whole.
        if self.pixels == 16 and 2 not in self.characters:
            raise ValueError("three characters do not fit into 16 pixels; give characters: [2], or 32 pixels")
        return self

    def problem(self, rng: random.Random) -> Row:
        lengths = [n for n in self.characters if self.pixels > 16 or n == 2]
        text = "".join(rng.choice(self.alphabet) for _ in range(rng.choice(lengths)))
        return {"prompt": f"text {text}", "text": text}

    def paint(self, row: Mapping[str, Any], rng: random.Random) -> np.ndarray:
        ink, paper = rng.choice(PAIRS)
        picture = np.empty((self.pixels, self.pixels, 3), dtype=np.uint8)
        picture[:] = paper
        lay = Layout(self.pixels, len(row["text"]))
        down, right = (rng.choice(lay.downward), rng.choice(lay.sideways)) if self.moved else (0, 0)
        top, left = lay.top + down, lay.left + right
        for i, name in enumerate(row["text"]):
            x = left + i * lay.advance
            picture[top : top + lay.height, x : x + lay.width][character(name, lay.scale)] = ink
        return picture

    def split(self, row: Mapping[str, Any], picture: np.ndarray) -> Split:
        return hashed_split(row["text"].encode())

    @classmethod
    def score(cls, row: Mapping[str, Any], picture: np.ndarray, graded: bool) -> float:
        """Template matching in each cell.

        Ink is a pixel's distance from the picture's median colour, 0 at a quarter and 1 at three quarters of the 95th
        percentile. A character's match is the correlation of its cell's ink with its template, at the one place of the
        text (within two pixels of the font vertically, one horizontally) where the wanted characters match best.
        Graded: the mean over cells of the wanted character's match, halved where another character matches better,
        times the share of all ink that lies in the text's box grown by a pixel. Otherwise 1 or 0: every cell matches
        the wanted character best and to 0.6 or more, and 0.9 of the ink lies in the box.
        """
        text, lay = row["text"], Layout(picture.shape[0], len(row["text"]))
        ink = _ink(picture)
        if ink is None or picture.shape[0] != picture.shape[1] or lay.left < 0:
            return 0.0
        places = [(lay.top + dy, lay.left + dx) for dy in lay.downward for dx in lay.sideways]
        cells = np.stack(
            [
                ink[y : y + lay.height, x + i * lay.advance : x + i * lay.advance + lay.width].ravel()
                for y, x in places
                for i in range(len(text))
            ]
        )
        cells = cells - cells.mean(1, keepdims=True)
        cells /= np.maximum(np.sqrt((cells**2).sum(1, keepdims=True)), 1e-6)
        matches = (cells @ templates(lay.scale).T).reshape(len(places), len(text), -1)
        wanted = matches[:, np.arange(len(text)), [CHARACTERS.index(c) for c in text]]
        best = int(wanted.sum(1).argmax())
        match, read = wanted[best], wanted[best] >= matches[best].max(1)
        y, x = places[best]
        inside = ink[y - 1 : y + lay.height + 1, max(x - 1, 0) : x + lay.total + 1].sum() / ink.sum()
        if not graded:
            return float(read.all() and match.min() >= 0.6 and inside >= 0.9)
        return float((match.clip(0, 1) * np.where(read, 1, 0.5)).mean() * inside)


class Layout:
    """Where the characters of a text stand, in pixels: `top` and `left` when it is not moved, `advance` from one
    character to the next, `downward` and `sideways` by how much it may be moved."""

    def __init__(self, pixels: int, length: int):
        self.scale = pixels // 16
        self.height, self.width = HEIGHT * self.scale, WIDTH * self.scale
        gap = min(self.scale, (pixels - length * self.width) // (length - 1)) if length > 1 else 0
        self.advance = self.width + gap
        self.total = length * self.advance - gap
        self.top, self.left = (pixels - self.height) // 2, (pixels - self.total) // 2
        self.downward = range(-2 * self.scale, 2 * self.scale + 1)
        slack = max(min(self.scale, self.left), 0)
        self.sideways = range(-slack, slack + 1)


def _ink(picture: np.ndarray) -> np.ndarray | None:
    """float32 `[H, W]` in 0..1, or None where a picture is of one colour."""
    away = np.sqrt(((picture - np.median(picture, axis=(0, 1))) ** 2).sum(-1))
    full = float(np.quantile(away, 0.95))
    return ((away / full - 0.25) / 0.5).clip(0, 1) if full >= 0.1 else None
