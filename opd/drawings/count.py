"""Objects to count: `three red circles`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from opd.drawings.base import Drawing, Row, Split, hashed_split
from opd.drawings.cartoon import cartoon, object_score, objects
from opd.drawings.palette import COLOURS, GREYS
from opd.drawings.shapes import SHAPES, shape_mask

NUMBERS = ("one", "two", "three", "four")


class Count(Drawing):
    """One to four equal shapes of one colour on plain grey: each in a quarter of its own, at a random place and of
    a random size unless it is not `moved`.

    A quarter of the triples (number, colour, shape) is held out: they are the split `unseen`, in which every number,
    colour and shape is as frequent as elsewhere. The other splits share their triples, not their pictures: a hash of
    the picture decides.
    """

    kind: Literal["count"] = "count"
    symbols: ClassVar = (*NUMBERS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES))
    longest: ClassVar = 3

    moved: bool = Field(True, description="Random places and sizes; else all fill the middle of their quarter")

    def problem(self, rng: random.Random) -> Row:
        number, colour, shape = rng.randint(1, 4), rng.choice(list(COLOURS)), rng.choice(SHAPES)
        prompt = f"{NUMBERS[number - 1]} {colour} {shape}{'s' if number > 1 else ''}"
        return {"prompt": prompt, "number": number, "colour": colour, "shape": shape}

    def paint(self, row: Mapping[str, Any], rng: random.Random) -> np.ndarray:
        picture = np.empty((self.pixels, self.pixels, 3), dtype=np.uint8)
        picture[:] = rng.choice(list(GREYS.values()))
        cell = self.pixels // 2
        for quarter in rng.sample(range(4), row["number"]):
            largest = round(0.75 * cell)
            size = rng.randint(max(5, round(0.45 * cell)), largest) if self.moved else largest
            # A pixel of each side of a quarter stays free, so that neighbours never touch.
            free = cell - 1 - size
            y, x = (
                (rng.randint(1, free) if self.moved else (1 + free) // 2) + start * cell for start in divmod(quarter, 2)
            )
            picture[y : y + size, x : x + size][shape_mask(row["shape"], size, size)] = COLOURS[row["colour"]]
        return picture

    def split(self, row: Mapping[str, Any], picture: np.ndarray) -> Split:
        if (row["number"] + list(COLOURS).index(row["colour"])) % 4 == SHAPES.index(row["shape"]):
            return "unseen"
        return hashed_split(row["prompt"].encode() + picture.tobytes())

    @classmethod
    def score(cls, row: Mapping[str, Any], picture: np.ndarray, graded: bool) -> float:
        return object_score(objects(cartoon(picture)), row["number"], row["colour"], row["shape"], graded)
