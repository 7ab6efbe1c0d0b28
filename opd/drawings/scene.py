"""An object in front of a named gradient: `red circle on dawn`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from scipy import ndimage

from opd.drawings.base import Drawing, Row, Split, hashed_split
from opd.drawings.cartoon import cartoon, object_score, objects
from opd.drawings.palette import COLOURS, GRADIENTS, gradient
from opd.drawings.shapes import SHAPES, shape_mask

EXACT_DISTANCE = 0.1
FREE_DISTANCE, LARGEST_DISTANCE = 0.02, 0.4
"""Distances of a background to the wanted one, in RGB, that cost nothing and everything."""


class Scene(Drawing):
    """One shape of one colour, at a random place and of a random size, on one of six vertical gradients.

    A sixth of the triples (colour, shape, background) is the split `unseen`; the other splits share their triples, not
    their pictures.
    """

    kind: Literal["scene"] = "scene"
    symbols: ClassVar = (*COLOURS, *SHAPES, "on", *GRADIENTS)
    longest: ClassVar = 4

    def problem(self, rng: random.Random) -> Row:
        colour, shape, background = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(GRADIENTS))
        row = {"prompt": f"{colour} {shape} on {background}", "colour": colour, "shape": shape}
        return row | {"background": background}

    def paint(self, row: Mapping[str, Any], rng: random.Random) -> np.ndarray:
        picture = np.repeat(gradient(row["background"], self.pixels)[:, None], self.pixels, axis=1)
        size = rng.randint(round(0.3 * self.pixels), round(0.5 * self.pixels))
        y, x = (rng.randint(1, self.pixels - 1 - size) for _ in range(2))
        picture[y : y + size, x : x + size][shape_mask(row["shape"], size, size)] = COLOURS[row["colour"]]
        return picture

    def split(self, row: Mapping[str, Any], picture: np.ndarray) -> Split:
        colour, background = list(COLOURS).index(row["colour"]), list(GRADIENTS).index(row["background"])
        held_out = (colour + SHAPES.index(row["shape"]) + background) % 6 == 0
        return "unseen" if held_out else hashed_split(row["prompt"].encode() + picture.tobytes())

    @classmethod
    def score(cls, row: Mapping[str, Any], picture: np.ndarray, graded: bool) -> float:
        seen = cartoon(picture)
        object_part = object_score(objects(seen), 1, row["colour"], row["shape"], graded)
        # The pixels around an object may be mixed with it.
        behind = ~ndimage.binary_dilation(seen.labels > 0, iterations=1)
        if not behind.any():
            return 0.0
        distances = {}
        for name in GRADIENTS:
            away = picture - gradient(name, picture.shape[0])[:, None].astype(np.float32) / 255
            distances[name] = float(np.sqrt((away**2).sum(-1))[behind].mean())
        distance = distances[row["background"]]
        if not graded:
            right = distance == min(distances.values()) and distance <= EXACT_DISTANCE
            return float(object_part == 1 and right)
        lost = (distance - FREE_DISTANCE) / (LARGEST_DISTANCE - FREE_DISTANCE)
        return 0.5 * object_part + 0.5 * min(max(1 - lost, 0.0), 1.0)
