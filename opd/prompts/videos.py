"""Videos in a prompt's row: where they are, what they may be, and how frames of them are read."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opd.errors import DataError
from opd.prompts.base import Prompt
from opd.prompts.pictures import ADDRESS, place_of

SUFFIXES = frozenset([".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"])
"""What the name of a file with a video ends with."""
KEYS = ("frames", "video")
"""Of an object that is a video, besides `path` and `bytes`."""

Plan = Callable[[int, float, tuple[int, int]], tuple[Sequence[int], tuple[int, int]]]
"""From the number of frames, their rate in frames a second and `(height, width)`: which frames are taken, in order,
and the height and width that they are brought to."""


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: uint8 `[F, H, W, 3]`.
        times: F seconds from the clip's beginning.
        rate: frames taken a second.
    """

    frames: np.ndarray
    times: tuple[float, ...]
    rate: float


def is_video(value: object) -> bool:
    """Whether a column's value is a video or a list of them, told by a file's name or by its keys."""
    if isinstance(value, list | tuple):
        return bool(value) and all(is_video(each) and not isinstance(each, list | tuple) for each in value)
    if isinstance(value, str):
        return Path(value).suffix.lower() in SUFFIXES
    if isinstance(value, dict) and "role" not in value:
        return any(key in value for key in KEYS) or is_video(value.get("path"))
    return False


def video_files(value: object, prompt: Prompt) -> list[Path]:
    """The files that a column's videos are in."""
    found = []
    for each in value if isinstance(value, list | tuple) else [value]:
        while isinstance(each, dict):
            each = each["video"] if "video" in each else each.get("path") if each.get("bytes") is None else None
        if isinstance(each, str):
            found.append(place_of(each, prompt))
    return found


def source_of(value: object, prompt: Prompt, column: str, largest: int) -> tuple[object, float, float]:
    """`(path, bytes or {frames, fps}, start, end)` of a video, whose file was looked at and not opened; seconds, `end`
    infinite where it is not cut.

    Raises:
        DataError: it is nothing of the kind, an address, not there, or has more than `largest` bytes.
    """
    where = f"{prompt.where}: the video in column {column!r}"
    start, end = 0.0, math.inf
    if isinstance(value, dict) and "video" in value:
        start, end = (_seconds(value.get(key, other), key, where) for key, other in (("start", 0.0), ("end", math.inf)))
        if start >= end:
            raise DataError(f"{where} is cut from {start:g} to {end:g} seconds, which is no part of it")
        value = value["video"]
    if isinstance(value, dict) and "frames" not in value:
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        if ADDRESS.match(value):
            raise DataError(
                f"{where} is an address ({value[:60]!r}); nothing is fetched: download it and name the file"
            )
        value = place_of(value, prompt)
    if isinstance(value, Path):
        if not value.is_file():
            looked = "in the working directory" + (f" and in {prompt.folder}" if prompt.folder is not None else "")
            raise DataError(f"{where}: no file {str(value)!r}; a relative path is looked for {looked}")
        size = value.stat().st_size
    elif isinstance(value, bytes):
        size = len(value)
    elif isinstance(value, dict):
        size = 0
    else:
        raise DataError(
            f"{where} is of type {type(value).__name__}; give a file's path, encoded bytes, "
            "{frames: uint8 [F, H, W, 3], fps}, or {video, start, end} for a part of one"
        )
    if size > largest:
        raise DataError(f"{where} has {size} bytes, more than {largest}; raise videos.largest_file")
    return value, start, end


def read(source: object, start: float, end: float, where: str, plan: Plan) -> Clip:
    """The frames that `plan` takes of a source that `source_of` gave, of its part from `start` to `end`.

    Files are read by PyAV, whatever it decodes inside MP4, Matroska or AVI; no other file and no address that one names
    is opened. Frames are decoded one after the other and brought to their size at once, so that a long video takes the
    memory of what is taken of it.

    Raises:
        DataError: it is damaged, holds no frame there, or PyAV is not installed.
    """
    if isinstance(source, dict):
        return _of_frames(source, start, end, where, plan)
    assert isinstance(source, bytes | Path)
    with _opened(source, where) as (container, stream):
        stamps = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        if not stamps:
            raise DataError(f"{where} holds no frame")
        times = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
        inside = [i for i, time in enumerate(times) if start <= time < end]
        rate = float(stream.average_rate or 0) or (len(times) - 1) / max(times[-1], 1e-6)
        container.seek(stamps[0], stream=stream)
        # Cameras say which side is up, by quarters of a turn against the clock.
        turns = round(next(container.decode(stream)).rotation / 90) % 4
        high, wide = (stream.width, stream.height) if turns % 2 else (stream.height, stream.width)
        chosen, size = _planned(plan, inside, rate, (high, wide), where)
        container.seek(stamps[0], stream=stream)
        places = {stamp: i for i, stamp in enumerate(stamps)}
        wanted = {inside[i] for i in chosen}
        kept: dict[int, np.ndarray] = {}
        for frame in container.decode(stream):
            place = places.get(frame.pts, -1)
            if place in wanted:
                kept[place] = _sized(np.rot90(frame.to_ndarray(format="rgb24"), turns), size)
            if place >= max(wanted):
                break
        if not kept:
            raise DataError(f"{where} holds no frame that can be decoded")
        # A file may end before its index says so: the last frame stands for those that are not there.
        last = max(kept)
        frames = [kept.get(inside[i], kept[last]) for i in chosen]
    taken = tuple(times[inside[i]] - start for i in chosen)
    return Clip(np.stack(frames), taken, len(chosen) / len(inside) * rate)


def _of_frames(source: dict[str, Any], start: float, end: float, where: str, plan: Plan) -> Clip:
    frames, rate = source["frames"], source.get("fps")
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        shape = (
            f"a {frames.dtype} array of shape {list(frames.shape)}" if isinstance(frames, np.ndarray) else "no array"
        )
        raise DataError(f"{where}: its frames are {shape}; give uint8 [F, H, W, 3]")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise DataError(f"{where}: its fps is {rate!r}; give its frames a second")
    inside = [i for i in range(len(frames)) if start <= i / rate < end]
    chosen, size = _planned(plan, inside, float(rate), frames.shape[1:3], where)
    shown = np.stack([_sized(frames[inside[i]], size) for i in chosen])
    return Clip(shown, tuple(inside[i] / rate - start for i in chosen), len(chosen) / len(inside) * rate)


def _planned(
    plan: Plan, inside: Sequence[int], rate: float, size: tuple[int, int], where: str
) -> tuple[Sequence[int], tuple[int, int]]:
    if not inside or min(size) < 1:
        raise DataError(f"{where} has no frame between its start and its end")
    return plan(len(inside), rate, size)


def _sized(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if frame.shape[:2] == size:
        return np.ascontiguousarray(frame)
    image = Image.fromarray(np.ascontiguousarray(frame)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _seconds(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise DataError(f"{where} has the {key} {value!r}; it is seconds from the video's beginning")
    return float(value)


@contextmanager
def _opened(source: bytes | Path, where: str) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ImportError:
        raise DataError(f"{where} is read by PyAV, which is not installed: pip install 'opd[video]'") from None
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            container = _container(file.read(12), where)
            file.seek(0)
            # A file object, and no name: what names other files or addresses cannot open them.
            with av.open(file, format=container) as opened:
                if not opened.streams.video:
                    raise DataError(f"{where} holds no video")
                yield opened, opened.streams.video[0]
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # What a damaged file makes a decoder raise is not to be foreseen.
        raise DataError(
            f"{where} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0][:120]}); mend the file"
        ) from None


def _container(head: bytes, where: str) -> str:
    """What PyAV calls the kind of file that begins so; playlists and the like, which name other files, are none."""
    if head[4:8] == b"ftyp":
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    raise DataError(f"{where} is no MP4, MOV, Matroska, WebM or AVI file; convert it to one")
