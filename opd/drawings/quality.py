"""How clean a picture is, whatever it shows: smooth off its drawn edges, and in colours of the palette."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from opd.drawings.cartoon import cartoon

HALF_ENERGY = 0.1**2
"""Mean squared high-frequency residual at which smoothness is one half."""
LARGEST_DISTANCE = 0.3
"""Mean distance to the palette, in RGB, at which nothing is left."""


def quality(picture: np.ndarray) -> float:
    """In [0, 1]: `(1 - E / (E + 0.1^2)) * max(0, 1 - D / 0.3)` of float32 `[H, W, 3]`.

    R is what the picture differs from its cartoon (`opd.drawings.cartoon`), which has the drawn edges and no specks; E
    is the mean square over pixels and channels of R less its own 3 x 3 mean; D is the mean length of R over pixels.
    """
    residual = picture - cartoon(picture).colours
    smooth = ndimage.uniform_filter(residual, size=(3, 3, 1), mode="nearest")
    energy = float(((residual - smooth) ** 2).mean())
    distance = float(np.sqrt((residual**2).sum(-1)).mean())
    return (1 - energy / (energy + HALF_ENERGY)) * max(0.0, 1 - distance / LARGEST_DISTANCE)
