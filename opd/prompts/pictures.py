"""Pictures in a prompt's row: where they are, what they may be, and how they are opened."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps

from opd.errors import DataError
from opd.prompts.base import Prompt

T = TypeVar("T")

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"])
"""What the name of a file with a picture ends with, where a column may hold a text as well."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is opened: other formats of Pillow start programs or are read by little-used code."""
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:(//|[a-z]+/)", re.I)
RED = (255, 0, 0)


@dataclass(frozen=True)
class Limits:
    """What a picture may take: `bytes` of its file, `pixels` when it is opened."""

    bytes: int = 64 * 2**20
    pixels: int = 2**26


def is_picture(value: object) -> bool:
    """Whether a column's value is a picture or a list of them, and no text and no messages."""
    if isinstance(value, list | tuple):
        return bool(value) and all(is_picture(each) and not isinstance(each, list | tuple) for each in value)
    if isinstance(value, str):
        return bool(ADDRESS.match(value)) or Path(value).suffix.lower() in SUFFIXES
    if isinstance(value, dict):
        return "role" not in value and not {"path", "bytes", "picture"}.isdisjoint(value)
    return isinstance(value, bytes | Image.Image) or (isinstance(value, np.ndarray) and value.ndim >= 2)


def pictures_in(value: object) -> list[object]:
    """The pictures of a column: one, a list, or none for nothing."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def files_of(value: object, prompt: Prompt) -> list[Path]:
    """The files that a column's pictures are in."""
    found: list[Path] = []
    for each in pictures_in(value):
        while isinstance(each, dict):
            each = each["picture"] if "picture" in each else each.get("path") if each.get("bytes") is None else None
        if isinstance(each, str):
            found.append(place_of(each, prompt))
    return found


def opened(value: object, prompt: Prompt, column: str, limits: Limits) -> Image.Image:
    """A picture in RGB, turned as its camera says.

    Args:
        value: path of a file, uint8 `[H, W, 3]` or `[H, W]`, a picture of PIL, encoded bytes, `{bytes, path}` as
            `datasets` has it; or `{picture, box, crop, scale, width}`: a picture of those kinds with a red frame round
            `box`, or of which `crop` alone is left, `scale` times as large (both `[left, top, right, bottom]` in pixels
            of the picture).

    Raises:
        DataError: it is none of these, is damaged, an address, or beyond the limits.
    """
    where = f"{prompt.where}: the picture in column {column!r}"
    if isinstance(value, dict) and "picture" in value:
        return _drawn(opened(value["picture"], prompt, column, limits), value, where, limits)
    return _with(value, prompt, where, limits, lambda image: _finished(image, where, limits))


def size_of(value: object, prompt: Prompt, column: str, limits: Limits) -> tuple[int, int]:
    """`(width, height)` of a picture as `opened` gives it; of a file its head alone is read."""
    where = f"{prompt.where}: the picture in column {column!r}"
    if isinstance(value, dict) and "picture" in value:
        return opened(value, prompt, column, limits).size

    def size(image: Image.Image) -> tuple[int, int]:
        _check_pixels(image.size, where, limits)
        # Cameras say which side is up.
        return image.size[::-1] if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else image.size

    return _with(value, prompt, where, limits, size)


def _with(value: object, prompt: Prompt, where: str, limits: Limits, then: Callable[[Image.Image], T]) -> T:
    """What `then` makes of a picture that is open while it does."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, np.ndarray):
        return then(_of_array(value, where))
    if isinstance(value, str | Path):
        value = _file(str(value), prompt, where, limits)
    if not isinstance(value, bytes | Path | Image.Image):
        raise DataError(
            f"{where} is of type {type(value).__name__}; give a file's path, uint8 [H, W, 3], a picture of PIL or "
            "encoded bytes"
        )
    if isinstance(value, bytes) and len(value) > limits.bytes:
        raise DataError(f"{where} has {len(value)} bytes, more than {limits.bytes}; raise student.largest_file")
    source = io.BytesIO(value) if isinstance(value, bytes) else value
    try:
        if isinstance(source, Image.Image):
            # One of a file is read when it is looked at first, and may have been closed.
            return then(source)
        with warnings.catch_warnings(), Image.open(source, formats=FORMATS) as image:
            # The limit is ours, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return then(image)
    except DataError:
        raise
    except Exception as error:
        # What a damaged file makes a decoder raise is not to be foreseen.
        raise DataError(
            f"{where} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0][:120]}); mend the file"
        ) from None


def _finished(image: Image.Image, where: str, limits: Limits) -> Image.Image:
    _check_pixels(image.size, where, limits)
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{where} has more than 8 bits a colour (mode {image.mode}); save it with 8")
    turned = ImageOps.exif_transpose(image) or image
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        # What is transparent is white, as on a page.
        ground = Image.new("RGBA", turned.size, "white")
        turned = Image.alpha_composite(ground, turned.convert("RGBA"))
    return turned.convert("RGB")


def _of_array(value: np.ndarray, where: str) -> Image.Image:
    if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4))):
        raise DataError(
            f"{where} is a {value.dtype} array of shape {list(value.shape)}; give uint8 [H, W, 3] or [H, W] in 0..255"
        )
    if not value.size:
        raise DataError(f"{where} has no pixel; its shape is {list(value.shape)}")
    return Image.fromarray(value)


def _check_pixels(size: tuple[int, int], where: str, limits: Limits) -> None:
    if size[0] * size[1] > limits.pixels:
        raise DataError(
            f"{where} has {size[0]} x {size[1]} pixels, more than {limits.pixels} in all; make it smaller, or raise "
            "student.largest_picture"
        )


def _file(path: str, prompt: Prompt, where: str, limits: Limits) -> Path:
    if ADDRESS.match(path):
        raise DataError(f"{where} is an address ({path[:60]!r}); nothing is fetched: download it and name the file")
    place = place_of(path, prompt)
    try:
        size = place.stat().st_size
        if not place.is_file():
            raise DataError(f"{where}: {path!r} is no file")
        if size > limits.bytes:
            raise DataError(f"{where} has {size} bytes, more than {limits.bytes}; raise student.largest_file")
        return place
    except FileNotFoundError:
        looked = "in the working directory" + (f" and in {prompt.folder}" if prompt.folder is not None else "")
        raise DataError(f"{where}: no file {path!r}; a relative path is looked for {looked}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {path!r} cannot be read ({error})") from None


def place_of(path: str, prompt: Prompt) -> Path:
    """Where a file is: from the working directory, else beside the file of prompts."""
    place = Path(path).expanduser()
    beside = place if prompt.folder is None else prompt.folder / place
    return place if place.exists() or not beside.exists() else beside


def _drawn(image: Image.Image, value: dict[str, Any], where: str, limits: Limits) -> Image.Image:
    """The picture with a frame, or a part of it."""
    if (box := value.get("box")) is not None:
        left, top, right, bottom = corners(box, image.size, where)
        image = image.copy()
        width = int(value.get("width") or max(2, round(max(image.size) / 250)))
        # Round the box, not over it: what is asked for stays to be seen.
        outer = (left - width, top - width, right + width - 1, bottom + width - 1)
        frame = (max(0, outer[0]), max(0, outer[1]), min(image.width - 1, outer[2]), min(image.height - 1, outer[3]))
        ImageDraw.Draw(image).rectangle(frame, outline=RED, width=width)
    if (crop := value.get("crop")) is not None:
        part = image.crop(corners(crop, image.size, where))
        scale = float(value.get("scale") or 1.0)
        size = (max(1, round(part.width * scale)), max(1, round(part.height * scale)))
        _check_pixels(size, where, limits)
        image = part.resize(size, Image.Resampling.BICUBIC) if size != part.size else part
    return image


def corners(box: object, size: tuple[int, int], where: str) -> tuple[int, int, int, int]:
    """`(left, top, right, bottom)` in whole pixels that hold the box, cut at the picture's edges.

    Raises:
        DataError: it is no box, less than half of it lies in the picture, or it is given in shares.
    """
    numbers = [float(x) for x in box] if isinstance(box, Sequence | np.ndarray) and _are_numbers(box) else []
    if len(numbers) != 4 or not all(np.isfinite(numbers)):
        raise DataError(f"{where} has the box {box!r}; a box is [left, top, right, bottom] in pixels")
    left, top = (max(0, int(np.floor(x))) for x in numbers[:2])
    right, bottom = (min(side, int(np.ceil(x))) for x, side in zip(numbers[2:], size, strict=True))
    if not (left < right and top < bottom):
        raise DataError(
            f"{where} is {size[0]} x {size[1]} pixels large and has the box {numbers}, of which nothing lies in it; a "
            "box is [left, top, right, bottom] in pixels"
        )
    width, height = numbers[2] - numbers[0], numbers[3] - numbers[1]
    if max(numbers) <= 1 and min(width, height) < 1:
        raise DataError(
            f"{where} has the box {numbers}, which is less than a pixel; set units: share if it is in parts of the "
            "picture"
        )
    # A little beyond an edge is how boxes are drawn; most of it beyond is a box in other units, or of another picture.
    inside = (min(size[0], numbers[2]) - max(0.0, numbers[0])) * (min(size[1], numbers[3]) - max(0.0, numbers[1]))
    if inside < width * height / 2:
        raise DataError(
            f"{where} is {size[0]} x {size[1]} pixels large and has the box {numbers}, of which most lies outside; "
            "is it in other units, or of the picture at another size?"
        )
    return left, top, right, bottom


def _are_numbers(box: Any) -> bool:
    return not isinstance(box, str) and all(isinstance(x, int | float | np.number) for x in box)
