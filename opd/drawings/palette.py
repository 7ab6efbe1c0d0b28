"""The colours of all drawings, as uint8 RGB: four for objects, greys and named gradients for what lies behind them."""

from __future__ import annotations

import functools

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (219, 41, 41),
    "green": (33, 158, 64),
    "blue": (36, 77, 217),
    "yellow": (245, 204, 26),
}
GREYS = {"white": (245, 245, 245), "silver": (191, 191, 191), "slate": (89, 89, 89), "black": (20, 20, 20)}
GRADIENTS = {
    "dawn": ((250, 204, 179), (184, 163, 201)),
    "dusk": ((92, 77, 120), (230, 158, 128)),
    "sea": ((209, 235, 240), (122, 163, 179)),
    "forest": ((209, 224, 199), (107, 133, 107)),
    "sand": ((247, 237, 209), (199, 173, 140)),
    "night": ((15, 15, 33), (71, 64, 97)),
}
"""Colours at the top and at the bottom; between them they change linearly."""


@functools.cache
def gradient(name: str, rows: int) -> np.ndarray:
    """uint8 `[rows, 3]`, from top to bottom."""
    top, bottom = (np.array(end, dtype=np.float64) for end in GRADIENTS[name])
    share = np.linspace(0, 1, rows)[:, None]
    made = np.rint(top * (1 - share) + bottom * share).astype(np.uint8)
    made.setflags(write=False)
    return made


@functools.cache
def palette() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(start, change, label)` of every colour that a drawing can have.

    A colour is `start + t * change` with t in 0..1, float32 `[P, 3]` each; only gradients change. `label` `[P]` is 0
    for what lies behind objects, otherwise the place of the object colour in `COLOURS`, from 1.
    """
    ends = [(colour, colour) for colour in (*COLOURS.values(), *GREYS.values())] + list(GRADIENTS.values())
    start, end = (np.array(side, dtype=np.float32) / 255 for side in zip(*ends, strict=True))
    labels = np.arange(1, len(ends) + 1)
    labels[len(COLOURS) :] = 0
    return start, end - start, labels


def nearest_colour(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The palette's nearest to each pixel of float32 `[H, W, 3]`: its place `[H, W]` and its colour `[H, W, 3]`."""
    start, change, _ = palette()
    flat = picture.reshape(-1, 3)
    along = flat @ change.T - (start * change).sum(1)
    length = (change**2).sum(1)
    t = (along / np.where(length > 0, length, 1)).clip(0, 1)
    # Squared distance to each colour, less the pixel's own square.
    away = (start**2).sum(1) - 2 * flat @ start.T - 2 * t * along + t**2 * length
    best = away.argmin(1)
    colour = start[best] + t[np.arange(len(flat)), best, None] * change[best]
    return best.reshape(picture.shape[:2]), colour.reshape(picture.shape)
