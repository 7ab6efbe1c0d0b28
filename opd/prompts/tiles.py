"""Pictures of small tiles with a character each, and questions about one of them: rows for `boxed`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from opd.drawings.base import Split, hashed_split
from opd.drawings.font import CHARACTERS, HEIGHT, WIDTH, character
from opd.errors import DataError
from opd.prompts.base import Prompts

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 30, 30),
    "green": (20, 140, 40),
    "blue": (30, 60, 220),
    "orange": (235, 140, 0),
    "purple": (130, 30, 170),
    "teal": (0, 150, 160),
    "brown": (110, 70, 30),
    "pink": (235, 90, 170),
}
SIDE = 16
"""Pixels of a tile: with patches of 8 pixels, merged two by two, exactly one token of a picture."""
CELLS = 4
"""Places for tiles along each side; round them lies an empty frame, so that a crop with its margin is never cut."""
ASKED = ("sign", "on", "the", "tile", "?", "tiles", "there", "are")
HINT = ("look", "inside", "the", "red", "frame")
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
SYMBOLS = tuple(dict.fromkeys((*ASKED, *HINT, *COLOURS, *COUNTS, *CHARACTERS)))
"""Every word that prompts and answers hold."""


class TilePrompts(Prompts):
    """`size` pictures of 96 pixels with coloured tiles, drawn by `seed`; each tile has a character of 10 x 14 pixels.

    Rows have `prompt` (`sign on the red tile ?`), `answer` and `response` (`red K`), `image` (uint8 `[96, 96, 3]`) and
    `box`, the tile's `[left, top, right, bottom]`, for `boxed`. With `ask: count` the question is how many tiles there
    are, which no crop answers: what may be forgotten meanwhile.
    """

    kind: Literal["tiles"] = "tiles"
    size: int = Field(1000, ge=1, le=1_000_000, description="Rows to draw")
    seed: int = Field(0, ge=0, description="Of the draw")
    split: Literal["train", "validation", "test"] = Field("train", description="Rows of one split occur in no other")
    ask: Literal["sign", "count"] = Field("sign", description="About one tile's character, or the number of tiles")
    tiles: int = Field(6, ge=1, le=8, description="In a picture; with ask: count at most")
    alphabet: str = Field("".join(CHARACTERS), min_length=2, description="Characters; fewer are easier to learn")

    @field_validator("alphabet")
    @classmethod
    def _in_the_font(cls, value: str) -> str:
        if strange := sorted(set(value) - set(CHARACTERS)):
            raise ValueError(f"{''.join(strange)!r} is not in the font; take characters of {''.join(CHARACTERS)}")
        return value

    def rows(self) -> Sequence[tuple[str, dict[str, Any] | DataError]]:
        # Shorter draws of one seed are the beginnings of longer ones.
        rng = random.Random(f"tiles {self.ask} {self.split} {self.seed}")
        found: list[tuple[str, dict[str, Any] | DataError]] = []
        while len(found) < self.size:
            row, key = self._row(rng)
            if hashed_split(key) == self._split:
                number = len(found)
                name = f"tiles-{self.ask}-{self.split}-{self.seed}-{number}"
                found.append((f"tiles {self.split}[{number}]", {"id": name, **row, self.column: row["prompt"]}))
        return found

    @property
    def _split(self) -> Split:
        return self.split

    def _row(self, rng: random.Random) -> tuple[dict[str, Any], bytes]:
        count = self.tiles if self.ask == "sign" else rng.randint(1, self.tiles)
        cells = sorted(rng.sample(range(CELLS**2), count))
        colours, signs = rng.sample(list(COLOURS), count), [rng.choice(self.alphabet) for _ in range(count)]
        side = SIDE * (CELLS + 2)
        noise = np.random.default_rng(rng.getrandbits(64))
        picture = noise.normal(rng.uniform(60, 200), 8, (side, side, 3)).clip(0, 255).astype(np.uint8)
        boxes = []
        for cell, colour, sign in zip(cells, colours, signs, strict=True):
            top, left = SIDE * (1 + cell // CELLS), SIDE * (1 + cell % CELLS)
            tile = picture[top : top + SIDE, left : left + SIDE]
            tile[:] = COLOURS[colour]
            ink = character(sign, 2)
            above, before = (SIDE - 2 * HEIGHT) // 2, (SIDE - 2 * WIDTH) // 2
            tile[above : above + 2 * HEIGHT, before : before + 2 * WIDTH][ink] = 255
            boxes.append([left, top, left + SIDE, top + SIDE])
        asked = rng.randrange(count)
        key = hashlib.sha256(repr((cells, colours, signs)).encode()).digest()
        if self.ask == "count":
            word = COUNTS[count - 1]
            return {"prompt": "tiles there are ?", "answer": word, "response": word, "image": picture}, key
        answer = f"{colours[asked]} {signs[asked]}"
        row = {"prompt": f"sign on the {colours[asked]} tile ?", "answer": answer, "response": answer}
        return {**row, "image": picture, "box": boxes[asked]}, key
