"""What a picture shows: each pixel's nearest colour of the palette, without specks, and the objects made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from opd.drawings.palette import COLOURS, nearest_colour, palette
from opd.drawings.shapes import Shape, classify

SMALLEST = 0.01
"""Connected pixels of one colour that take less of the picture than this are a speck, not an object."""

_EIGHT = np.ones((3, 3), dtype=bool)
_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Cartoon:
    """A picture in colours of the palette.

    Attributes:
        places: int `[H, W]`, places in the palette (`opd.drawings.palette.palette`).
        labels: int `[H, W]`, 0 behind objects, otherwise the object's colour.
        colours: float32 `[H, W, 3]`.
    """

    places: np.ndarray
    labels: np.ndarray
    colours: np.ndarray


@dataclass(frozen=True)
class Found:
    """An object: its colour, the shape that it is nearest to, and their intersection over union."""

    colour: str
    shape: Shape
    fit: float

    def credit(self, colour: str, shape: Shape) -> float:
        """Half for the right colour, half times `fit` for the right shape."""
        return 0.5 * (self.colour == colour) + 0.5 * self.fit * (self.shape == shape)

    def exact(self, colour: str, shape: Shape) -> bool:
        return self.colour == colour and self.shape == shape and self.fit >= 0.7


def cartoon(picture: np.ndarray) -> Cartoon:
    """Of float32 `[H, W, 3]` in 0..1; specks take the colour of the nearest pixel that is in none."""
    places, colours = nearest_colour(picture)
    labels = palette()[2][places]
    speck = np.zeros_like(labels, dtype=bool)
    for label in np.unique(labels):
        components, _ = ndimage.label(labels == label, structure=_EIGHT)
        small = np.bincount(components.ravel()) < SMALLEST * labels.size
        small[0] = False
        speck |= small[components]
    if speck.any() and not speck.all():
        y, x = ndimage.distance_transform_edt(speck, return_distances=False, return_indices=True)
        places, labels, colours = places[y, x], labels[y, x], colours[y, x]
    return Cartoon(places, labels, colours)


def objects(seen: Cartoon) -> list[Found]:
    """The connected components of each object colour."""
    found = []
    for label in np.unique(seen.labels[seen.labels > 0]):
        components, _ = ndimage.label(seen.labels == label, structure=_EIGHT)
        for i, box in enumerate(ndimage.find_objects(components), start=1):
            found.append(Found(_NAMES[label - 1], *classify(components[box] == i)))
    return found


def object_score(found: Sequence[Found], number: int, colour: str, shape: Shape, graded: bool) -> float:
    """How well the objects of a picture are `number` objects of that colour and shape, and no others.

    Graded: the `number` best credits (`Found.credit`), summed, over the larger of `number` and the objects found.
    Otherwise 1 or 0: as many as wanted, each of the right colour and shape with a fit of 0.7 or more.
    """
    if not graded:
        return float(len(found) == number and all(one.exact(colour, shape) for one in found))
    credits = sorted((one.credit(colour, shape) for one in found), reverse=True)
    return sum(credits[:number]) / max(number, len(found))
