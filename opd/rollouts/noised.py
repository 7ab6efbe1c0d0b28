"""Off-policy for flow models: images that exist already, with noise added."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field

from opd.context import Context
from opd.errors import DataError, IncompatibleError
from opd.flow.denoising import Denoising, pack
from opd.flow.guidance import guidance_of
from opd.flow.model import FlowModel, flow_model_of
from opd.flow.rollout import GridSettings
from opd.prompts import Prompt
from opd.rollouts.base import HeldOutSampler, PrefixSource, Rollout, row_seed
from opd.rollouts.request import Request
from opd.rollouts.turns import Turns
from opd.trajectories import Author, Trajectories

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class NoisedRollout(GridSettings, Rollout):
    """The image in a column of the prompt's row, on the straight line to fresh noise.

    With `times: logit_normal` a trajectory is one latent at a random time and its action is the image itself: with
    `objective: sft` that is flow matching, without guidance. With `times: grid` it is the latents at the sampler's own
    times, for divergences on states that nobody sampled.
    """

    kind: Literal["noised"] = "noised"
    modality: ClassVar[str | None] = "flow"
    column: str = Field(
        "image", description="Column with uint8 [H, W, 3], an image's path, one of PIL or of a dataset, or a list"
    )
    times: Literal["logit_normal", "grid"] = Field(
        "logit_normal", description="Where between image and noise: drawn, or the student's own grid"
    )
    drop_prompt: float = Field(0.0, ge=0.0, lt=1.0, description="Share that learns without its prompt, for guidance")
    author: Literal["data", "teacher"] = Field("data", description="Who made the images, for objectives that ask")

    @property
    def budget(self) -> int:
        return 1 if self.times == "logit_normal" else self.trained_steps

    def files(self, prompt: Prompt) -> list[Path]:
        found = _each(prompt.fields.get(self.column))
        paths = [one.get("path") if isinstance(one, dict) and one.get("bytes") is None else one for one in found]
        return [_place(path, prompt) for path in paths if isinstance(path, str)]

    @property
    def sampled(self) -> int:
        return 0

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> NoisedImages:
        return NoisedImages(self, flow_model_of(student, "the student"))


class NoisedImages(PrefixSource[NoisedRollout]):
    """The built source. Nothing is drawn from a model: log-probabilities are not known and stand as 0."""

    def __init__(self, settings: NoisedRollout, model: FlowModel):
        self.settings, self.model = settings, model
        author: Author = settings.author
        self.authors = frozenset({author})
        self.turns = Turns()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            for found in self.images(prompt):
                # Of a file the header is read; to decode them all would take long.
                if isinstance(found, str | bytes | Image.Image):
                    with _opened(found, prompt):
                        pass
                else:
                    self.pixels(found, prompt)

    def exact(self, settings: NoisedRollout) -> bool:
        return False

    def held_out(self, settings: NoisedRollout, context: Context, student: Student) -> HeldOutSampler:
        """The student's sampler on this rollout's grid."""
        own = student.own_sampler(context)
        return own.changed(**{name: getattr(settings, name) for name in GridSettings.model_fields})

    def drawn(self, request: Request[NoisedRollout]) -> None:
        self.turns.drawn([prompt for prompt in request.prompts if len(self.images(prompt)) > 1])

    def state_dict(self) -> dict[str, Any]:
        return self.turns.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns.load_state_dict(state)

    def images(self, prompt: Prompt) -> list[object]:
        """What a row has: paths, encoded bytes, and whatever else stands there."""
        found = _each(prompt.view(self.settings.column))
        return [self._encoded(one, prompt) if isinstance(one, dict) else one for one in found]

    def _encoded(self, image: dict[str, Any], prompt: Prompt) -> object:
        """Bytes or path of what `datasets` calls an image."""
        encoded = next((image[key] for key in ("bytes", "path") if image.get(key) is not None), None)
        if encoded is None:
            raise DataError(
                f"{prompt.where}: column {self.settings.column!r} holds a mapping with {sorted(map(str, image))}; an "
                "image of a dataset has 'bytes' or a 'path': download the file and give its path"
            )
        return encoded

    def pixels(self, found: object, prompt: Prompt) -> np.ndarray:
        """uint8 `[H, W, 3]` of one of `images`."""
        size = self.model.resolution
        try:
            pixels = _read(found, size, prompt) if isinstance(found, str | bytes | Image.Image) else np.asarray(found)
        except ValueError as error:
            raise DataError(f"{prompt.where}: column {self.settings.column!r} holds no image ({error})") from None
        if pixels.dtype != np.uint8 or pixels.shape != (size, size, 3):
            raise DataError(
                f"{prompt.where}: column {self.settings.column!r} holds {pixels.dtype} {list(pixels.shape)}; the "
                f"student draws uint8 [{size}, {size}, 3]"
            )
        return pixels

    def image(self, prompt: Prompt, turn: int) -> torch.Tensor:
        """float32 `[3, H, W]` in -1..1; of several images of a row that whose turn it is."""
        found = self.images(prompt)
        pixels = self.pixels(found[turn % len(found)], prompt)
        return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)

    def __call__(self, request: Request[NoisedRollout]) -> Trajectories:
        if request.begun is not None:
            raise IncompatibleError("rollout 'noised' cannot go on what another source began")
        settings, device = request.settings, self.model.device
        prompts, group, stream = request.prompts, request.group, request.stream
        members = [(p, g) for p in prompts for g in range(group)]
        seeds = [row_seed(request.context.seed, stream, p, group, g) for p, g in members]
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        turns = [self.turns.of(p, stream) * group + g for p, g in members]
        images = self.model.latents(torch.stack([self.image(p, t) for (p, _), t in zip(members, turns, strict=True)]))
        noise = torch.stack([torch.randn(self.model.shape, generator=s) for s in streams]).to(device)
        dropped = [float(torch.rand(1, generator=s)) < settings.drop_prompt for s in streams]
        texts = ["" if gone else str(p.view()) for gone, (p, _) in zip(dropped, members, strict=True)]
        if settings.times == "logit_normal":
            at = torch.cat([torch.randn(1, generator=s) for s in streams]).sigmoid().clamp(1e-3, 1 - 1e-3)
            times = torch.stack([at, torch.zeros_like(at)], 1).to(device)
            level, guidance = 0.0, 1.0
        else:
            times = self.model.grid(settings.steps)[: request.budget + 1].repeat(len(members), 1)
            level, guidance = settings.noise, guidance_of(request.context)
        t = times.view(*times.shape, 1, 1, 1)
        line = (1 - t) * images[:, None] + t * noise[:, None]
        rows = [
            Denoising(condition, line[i, 0], times[i], level, guidance, images[i])
            for i, condition in enumerate(self.model.encoder.encode(texts))
        ]
        nothing = torch.zeros(times.shape[0], times.shape[1] - 1, device=device)
        return pack(prompts, group, rows, line[:, 1:], nothing, settings.author)


def _each(found: Any) -> list[Any]:
    """The images of a row, where it is one or a list of them."""
    kinds = str | bytes | np.ndarray | dict | Image.Image
    return found if isinstance(found, list) and bool(found) and isinstance(found[0], kinds) else [found]


def _read(source: str | bytes | Image.Image, size: int, prompt: Prompt) -> np.ndarray:
    """An image file, its bytes or what was read of them, scaled and cut to a square."""
    with _opened(source, prompt) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))


@contextlib.contextmanager
def _opened(source: str | bytes | Image.Image, prompt: Prompt) -> Iterator[Any]:
    """A file or its bytes, of which the header is read; what fails while it is open is an error of this row too."""
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else _place(source, prompt)) as image:
            yield image
    except FileNotFoundError:
        places = "in the working directory" + (f" and in {prompt.folder}" if prompt.folder is not None else "")
        raise DataError(
            f"{prompt.where}: image {source!r} cannot be read: no such file; a relative path is looked for {places}"
        ) from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        name = f"of {len(source)} bytes" if isinstance(source, bytes) else repr(source)
        raise DataError(f"{prompt.where}: image {name} cannot be read ({error})") from None


def _place(path: str, prompt: Prompt) -> Path:
    """Where a file is: from the working directory, else beside the file of prompts."""
    place = Path(path).expanduser()
    beside = place if prompt.folder is None else prompt.folder / place
    return place if place.exists() or not beside.exists() else beside
