"""Short clips of coloured shapes that come and go, and questions when one of them is there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from opd.drawings.base import Split, hashed_split
from opd.errors import DataError
from opd.prompts.base import Prompts
from opd.prompts.tiles import COLOURS

FPS, FRAMES, SIDE = 2, 32, 32
"""Frames a second, frames, and pixels along each side, of the largest clips: 16 seconds. With patches of 8 pixels
merged two by two and steps of two frames, such a clip has 16 steps of four tokens."""
SHORTEST = 3
"""Frames of an event, at least: 1.5 seconds. The longest takes half of the clip."""
SHAPES = ("disc", "square", "cross", "ring")
COUNTS = ("one", "two", "three", "four")
CHARACTERS = tuple("0123456789.-? ")
WORDS = (*COLOURS, *SHAPES, *COUNTS, "how", "many", "when", "shown")
"""What prompts and answers are made of."""
VOCABULARY = (CHARACTERS, WORDS, tuple(i / FPS for i in range(FRAMES)), SIDE)
"""What a model for them needs to know: see `opd.vision.creation.create_clip_model`."""


class ClipPrompts(Prompts):
    """`size` clips, drawn by `seed`, in each of which `events` shapes of different colours move for 1.5 seconds to half
    of the clip, when they like.

    Rows have `prompt` (`when red disc?`), `video` ({frames: uint8 `[F, H, W, 3]`, fps: 2}; by default F, H and W are
    32), `interval` in seconds on a grid of half a second, `duration`, and `response` and `answer` as a student writes
    them (`02.5-06.0`). With `ask: shown` the answer has a digit a frame, whether the shape is there (`0011110...`): a
    model with random weights learns to look from it. With `ask: count` the question is how many shapes there are: what
    may be forgotten meanwhile. `plain` clips have shapes of twice the size on one grey. With `slack` the responses are
    as those of careless annotators, who begin too early and end too late, and `annotated` is the interval in them;
    answers and `interval` are true.
    """

    kind: Literal["clips"] = "clips"
    size: int = Field(1000, ge=1, le=1_000_000, description="Rows to draw")
    seed: int = Field(0, ge=0, description="Of the draw")
    split: Literal["train", "validation", "test"] = Field("train", description="Rows of one split occur in no other")
    ask: Literal["when", "shown", "count"] = Field(
        "when", description="When one shape is there, in which frames, or how many there are"
    )
    seconds: int = Field(FRAMES // FPS, ge=4, le=FRAMES // FPS, description="Length of a clip, of two frames a second")
    pixels: Literal[16, 32] = Field(32, description="Side of a frame")
    events: int = Field(4, ge=1, le=4, description="Shapes in a clip; with ask: count at most")
    plain: bool = Field(False, description="Large shapes on one grey, for the smallest models")
    slack: float = Field(
        0.0, ge=0, multiple_of=0.5, description="Seconds by which responses begin too early and end too late"
    )
    colours: list[str] = Field(list(COLOURS), min_length=1, description="Of the shape that is asked for")

    @field_validator("colours")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        if strange := sorted(set(value) - set(COLOURS)):
            raise ValueError(f"{strange[0]!r} is no colour of a clip; take some of {', '.join(COLOURS)}")
        return value

    def rows(self) -> Sequence[tuple[str, dict[str, Any] | DataError]]:
        # Shorter draws of one seed are the beginnings of longer ones.
        rng = random.Random(f"clips {self.ask} {self.split} {self.seed} {' '.join(self.colours)}")
        found: list[tuple[str, dict[str, Any] | DataError]] = []
        while len(found) < self.size:
            row, frames, key = self._row(rng)
            if hashed_split(key) == self._split:
                row["video"] = {"frames": frames(), "fps": FPS}
                number = len(found)
                name = f"clips-{self.ask}-{self.split}-{self.seed}-{number}"
                found.append((f"clips {self.split}[{number}]", {"id": name, **row, self.column: row["prompt"]}))
        return found

    @property
    def _split(self) -> Split:
        return self.split

    def _row(self, rng: random.Random) -> tuple[dict[str, Any], Callable[[], np.ndarray], bytes]:
        """A row without its video, what draws that, and what says of which split it is."""
        count = rng.randint(1, self.events) if self.ask == "count" else self.events
        asked = rng.choice(self.colours)
        colours = [asked, *rng.sample([colour for colour in COLOURS if colour != asked], count - 1)]
        events = []
        total, side, radius = FPS * self.seconds, self.pixels, self.pixels // (4 if self.plain else 8)
        for colour in colours:
            length = rng.randint(SHORTEST, total // 2)
            start = rng.randint(0, total - length)
            path = [(rng.uniform(radius, side - radius), rng.uniform(radius, side - radius)) for _ in range(2)]
            events.append((colour, rng.choice(SHAPES), start, start + length, path))
        order = rng.sample(range(count), count)
        noise = rng.getrandbits(64)
        grey = 128 if self.plain else rng.uniform(60, 200)

        def drawn() -> np.ndarray:
            normal = np.random.default_rng(noise).normal(grey, 6, (total, side, side, 3))
            frames = normal.clip(0, 255).astype(np.uint8)
            for i in order:
                _paint(frames, radius, *events[i])
            return frames

        key = hashlib.sha256(repr([event[:4] for event in events]).encode()).digest()
        row: dict[str, Any] = {"duration": total / FPS}
        if self.ask == "count":
            word = COUNTS[count - 1]
            return {"prompt": "how many?", "answer": word, "response": word, **row}, drawn, key
        colour, shape, start, end, _ = events[0]
        if self.ask == "shown":
            text = "".join(str(int(start <= k < end)) for k in range(total))
            return {"prompt": f"shown {colour} {shape}?", "answer": text, "response": text, **row}, drawn, key
        interval = [start / FPS, end / FPS]
        loose = [max(0.0, interval[0] - self.slack), min(total / FPS, interval[1] + self.slack)]
        answer, response = ("-".join(f"{time:04.1f}" for time in times) for times in (interval, loose))
        row |= {"prompt": f"when {colour} {shape}?", "answer": answer, "response": response, "interval": interval}
        if self.slack:
            row["annotated"] = loose
        return row, drawn, key


def _paint(
    frames: np.ndarray, radius: int, colour: str, shape: str, start: int, end: int, path: Sequence[tuple[float, float]]
) -> None:
    """Draw a shape that moves along a line from its first frame to its last."""
    middles = np.arange(frames.shape[1]) + 0.5
    shares = np.arange(end - start) / max(end - start - 1, 1)
    rows, columns = ((1 - shares) * a + shares * b for a, b in zip(*path, strict=True))
    # Of each frame, row and column.
    down, right = abs(middles - rows[:, None])[:, :, None], abs(middles - columns[:, None])[:, None, :]
    if shape == "square":
        inside = np.maximum(down, right) < 0.85 * radius
    elif shape == "cross":
        inside = (np.minimum(down, right) < 0.35 * radius) & (np.maximum(down, right) < radius)
    else:
        away = np.hypot(down, right)
        inside = away < radius if shape == "disc" else (away < radius) & (away > 0.5 * radius)
    frames[start:end][inside] = COLOURS[colour]
