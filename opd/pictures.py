"""Pictures as text, so that a row of samples.jsonl and the page that shows it need no other file."""

from __future__ import annotations

import base64
import io

import numpy as np

ADDRESS = "data:image/png;base64,"


def png(picture: np.ndarray) -> bytes:
    """A PNG file of `[H, W, 3]`: uint8, or numbers in 0..1, clipped; what is not a number is black."""
    from PIL import Image

    if picture.dtype != np.uint8:
        picture = np.rint(255 * np.nan_to_num(picture).clip(0, 1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def data_address(picture: np.ndarray, largest: int = 256) -> str:
    """The `image` of a row: a PNG as a `data:` address, at most `largest` pixels a side; of a larger one
    whole blocks are averaged."""
    block = -(-max(picture.shape[:2]) // largest)
    if block > 1:
        height, width = (side // block for side in picture.shape[:2])
        shown = picture[: height * block, : width * block].reshape(height, block, width, block, 3)
        picture = shown.mean((1, 3)) / (255 if picture.dtype == np.uint8 else 1)
    return ADDRESS + base64.b64encode(png(picture)).decode()


def sheet(pictures: np.ndarray, columns: int, scale: int = 4, gap: int = 2) -> np.ndarray:
    """uint8 `[H', W', 3]`: uint8 `[B, H, W, 3]` in rows of `columns`, each pixel `scale` wide, with white between."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        page[y : y + height, x : x + width] = picture
    return page.repeat(scale, 0).repeat(scale, 1)
