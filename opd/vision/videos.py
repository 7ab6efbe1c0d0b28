"""Videos for image-text models: which frames, how large, in which patches, and how a family is told their times."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import ProcessorMixin

from opd.choice import Settings
from opd.errors import DataError, ModelError, RunError
from opd.files.whole import write_whole
from opd.language.memory import Memory
from opd.prompts import Prompt
from opd.prompts.videos import Clip, read, source_of

Times = Literal["text", "positions", "none"]
FAMILIES: dict[str, Times] = {
    "Qwen3VLProcessor": "text",
    "Qwen2_5_VLProcessor": "positions",
    "Qwen2VLProcessor": "none",
}
"""By the class of the processor, how a model is told when frames are: by a text before each step of frames, by the
seconds between steps, from which it makes rotary positions, or not at all."""


class VideoSettings(Settings):
    """Videos of prompts. Frames are taken at a rate and brought to the size that the limits allow."""

    column: str = Field(
        "video",
        description="Column with the prompt's videos, one or a list: each a file's path, encoded bytes, {video, start, "
        "end} for a part in seconds, or from Python {frames, fps} with uint8 [F, H, W, 3]",
    )
    fps: float = Field(2.0, gt=0, le=240, description="Frames a second")
    min_frames: int = Field(4, ge=1, description="Fewest frames, as far as the video has them")
    max_frames: int = Field(768, ge=1, description="Most frames; of longer videos at a lower rate")
    max_tokens: int = Field(8192, ge=1, description="Most tokens of a video; its frames are made smaller to fit")
    frame_tokens: int = Field(768, ge=1, description="Most tokens of one step of frames")
    largest_file: int = Field(2**31, ge=1, description="Bytes of a video's file, at most")
    cache: str | None = Field(
        None,
        description="Folder for frames of files, as they were sampled and made smaller, so that later runs read them "
        "from there; default this process remembers some",
    )


@dataclass(frozen=True)
class Family:
    """How the models of a processor take videos.

    Attributes:
        times: how they are told when frames are.
        patch, merge, step: pixels of a patch, patches merged along each side, and frames of a step.
        mean, std: of the three colours.
        tokens: the texts of a video's placeholder, and of what stands before and behind it.
    """

    times: Times
    patch: int
    merge: int
    step: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens: tuple[str, str, str]

    @classmethod
    def of(cls, processor: ProcessorMixin) -> Family:
        """Raises:
        ModelError: models with this processor are given no videos here.
        """
        found: Any = processor
        name = type(processor).__name__
        if name not in FAMILIES:
            raise ModelError(
                f"student.videos is set, and videos are read by models with one of {', '.join(FAMILIES)}; this one has "
                f"{name}: take another model, or leave videos out"
            )
        images = found.image_processor
        marks = [getattr(found, f"vision_{end}_token", f"<|vision_{end}|>") for end in ("start", "end")]
        return cls(
            FAMILIES[name],
            images.patch_size,
            images.merge_size,
            images.temporal_patch_size,
            tuple(images.image_mean),
            tuple(images.image_std),
            (found.video_token, *marks),
        )

    @property
    def factor(self) -> int:
        """Pixels of a token along each side."""
        return self.patch * self.merge

    def plan(
        self, settings: VideoSettings, total: int, rate: float, size: tuple[int, int]
    ) -> tuple[Sequence[int], tuple[int, int]]:
        """Which of `total` frames are taken, and the size that they get; see `opd.prompts.videos.Plan`."""
        chosen = self.chosen(settings, total, rate)
        steps = -(-len(chosen) // self.step)
        tokens = min(settings.frame_tokens, settings.max_tokens // steps)
        if tokens < 1:
            raise DataError(
                f"the video has {steps} steps of frames, and videos.max_tokens is {settings.max_tokens}; raise it, or "
                "lower videos.max_frames"
            )
        return chosen, size_within(size, self.factor, tokens * self.factor**2)

    def chosen(self, settings: VideoSettings, total: int, rate: float) -> Sequence[int]:
        """Places of the frames that are taken, as the family's own processor takes them."""
        wanted = total / rate * settings.fps
        if self.times == "text":
            count = min(max(int(wanted), settings.min_frames), settings.max_frames, total)
            return [int(i) for i in np.linspace(0, total - 1, count).round()]
        most = math.floor(min(settings.max_frames, total) / self.step) * self.step
        count = math.floor(min(max(wanted, settings.min_frames), most) / self.step) * self.step
        # A video with fewer frames than a step has is taken whole.
        return [int(i * total / count) for i in range(count)] if count else list(range(total))

    def patches(self, clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 `[P, 3 * step * patch^2]` of P patches, and int64 `[1, 3]` with their number in time, height and
        width: what models take as `pixel_values_videos` and `video_grid_thw`. The last frame is repeated where a step
        lacks one."""
        frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        frames = (frames - mean) / std
        lacking = -len(frames) % self.step
        frames = torch.cat([frames, frames[-1:].expand(lacking, -1, -1, -1)])
        high, wide = frames.shape[2] // self.patch, frames.shape[3] // self.patch
        grid = (len(frames) // self.step, high, wide)
        side = (self.merge, self.patch)
        cut = frames.view(grid[0], self.step, 3, high // self.merge, *side, wide // self.merge, *side)
        rows = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1)
        return rows, torch.tensor([grid])

    def text(self, clip: Clip, grid: torch.Tensor) -> str:
        """What stands in a text for the video: its placeholders, by step with times where the family reads them."""
        steps, high, wide = grid[0].tolist()
        pad, start, end = self.tokens
        of_step = pad * (high * wide // self.merge**2)
        if self.times != "text":
            return of_step * steps
        return "".join(f"<{time:.1f} seconds>{start}{of_step}{end}" for time in self.times_of(clip))

    def times_of(self, clip: Clip) -> list[float]:
        """The middle of each step's first and last frame, in seconds."""
        return middles(clip.times, self.step)

    def written(self, text: str, clips: Sequence[tuple[Clip, torch.Tensor]]) -> str:
        """A template's text with each video's placeholders. Where times are texts, the marks that the template
        puts round a video go, since every step has its own."""
        pad, start, end = self.tokens
        whole, found = f"{start}{pad}{end}", ""
        for clip, grid in clips:
            place = whole if self.times == "text" and whole in text else pad
            before, _, text = text.partition(place)
            found += before + self.text(clip, grid)
        return found + text


def middles(times: Sequence[float], step: int) -> list[float]:
    """Of each `step` of the times the middle of its first and last; the last is repeated where a step lacks one."""
    filled = [*times, *[times[-1]] * (-len(times) % step)]
    return [(filled[i] + filled[i + step - 1]) / 2 for i in range(0, len(filled), step)]


def size_within(size: tuple[int, int], factor: int, most: int) -> tuple[int, int]:
    """Height and width in whole multiples of `factor` near to `size`, of at most `most` pixels in all."""
    if max(size) > 200 * min(size):
        raise DataError(f"the frames have {size[1]} x {size[0]} pixels; models take no such band")
    found = [max(factor, round(side / factor) * factor) for side in size]
    if found[0] * found[1] > most:
        shrink = math.sqrt(size[0] * size[1] / most)
        found = [max(factor, math.floor(side / shrink / factor) * factor) for side in size]
        # A band one token wide may still be too long.
        longer = found.index(max(found))
        found[longer] = min(found[longer], max(1, most // (factor * min(found))) * factor)
    return found[0], found[1]


_CLIPS: Memory[Clip] = Memory(2**29)
"""What this process decoded, so that a student and its teachers get the same frames."""
_KEYS: dict[str, str] = {}


def clip_of(value: object, prompt: Prompt, column: str, settings: VideoSettings, family: Family) -> Clip:
    """A video's frames as a family takes them; of a file once.

    Raises:
        DataError: it cannot be read.
    """
    source, start, end = source_of(value, prompt, column, settings.largest_file)
    where = f"{prompt.where}: the video in column {column!r}"

    def decoded() -> Clip:
        try:
            return read(source, start, end, where, lambda *found: family.plan(settings, *found))
        except DataError as error:
            raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from None

    if not isinstance(source, Path):
        return decoded()
    state = source.stat()
    limits = settings.model_dump(include={"fps", "min_frames", "max_frames", "max_tokens", "frame_tokens"})
    facts = [str(source.resolve()), state.st_size, state.st_mtime_ns, start, str(end), limits]
    facts += [family.times, family.factor, family.step]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    # The memory goes by the object, so one text stands for all equal ones.
    name = _KEYS.setdefault(key, key)
    clip = _CLIPS.get(name, None)
    if clip is None:
        clip = _stored(Path(settings.cache), key, decoded) if settings.cache is not None else decoded()
        _CLIPS.keep(name, None, clip, clip.frames.nbytes)
    return clip


def _stored(folder: Path, key: str, decoded: Callable[[], Clip]) -> Clip:
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            found = load(path.read_bytes())
            return Clip(found["frames"].numpy(), tuple(found["times"].tolist()), float(found["rate"]))
        except (OSError, SafetensorError, KeyError, ValueError):
            # A damaged file of a cache is made again, and replaced where it is written.
            pass
    clip = decoded()
    numbers = {"times": torch.tensor(clip.times, dtype=torch.float64), "rate": torch.tensor(clip.rate).double()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"frames": torch.from_numpy(clip.frames), **numbers}), durable=False)
    except OSError as error:
        raise RunError(f"cannot write to videos.cache {str(folder)!r} ({error.strerror or error})") from None
    return clip
