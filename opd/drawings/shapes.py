"""Circles, squares and triangles that fill their box, and which of them a set of pixels is."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

Shape = Literal["circle", "square", "triangle"]
SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle")


@functools.lru_cache(4096)
def shape_mask(shape: Shape, height: int, width: int) -> np.ndarray:
    """bool `[height, width]`: the pixels of a shape that touches all four sides of its box."""
    y = (np.arange(height) + 0.5)[:, None] - height / 2
    x = (np.arange(width) + 0.5)[None, :] - width / 2
    if shape == "circle":
        mask = (2 * y / height) ** 2 + (2 * x / width) ** 2 <= 1
    elif shape == "square":
        mask = np.ones((height, width), dtype=bool)
    else:
        mask = np.abs(x) <= np.maximum((y + height / 2 + 0.5) * width / (2 * height), 0.5)
    mask.setflags(write=False)
    return mask


def classify(mask: np.ndarray) -> tuple[Shape, float]:
    """The shape that a component is nearest to, and how near: the intersection over union with that shape in the
    component's own box. `mask` is bool `[h, w]`, cut to the box."""
    found = []
    for shape in SHAPES:
        ideal = shape_mask(shape, *mask.shape)
        found.append((float((mask & ideal).sum() / (mask | ideal).sum()), shape))
    fit, shape = max(found, key=lambda pair: pair[0])
    return shape, fit
