"""What every drawing task shares: rows with their reference picture, splits, and the form of a picture."""

from __future__ import annotations

import hashlib
import random
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import Field

from opd.choice import Choice, kind_of
from opd.errors import DataError

Split = Literal["train", "validation", "test", "unseen"]
SPLITS: tuple[Split, ...] = get_args(Split)

Row = dict[str, Any]


class Drawing(Choice):
    """Base of the axis. A task makes problems, paints each in many ways, and scores any picture against a problem."""

    axis: ClassVar[str] = "drawing"
    symbols: ClassVar[tuple[str, ...]]
    """Every word, and every single character, that a prompt can hold."""
    longest: ClassVar[int]
    """Most symbols of a prompt."""

    pixels: int = Field(32, ge=16, le=256, multiple_of=16, description="Height and width of the pictures")

    @abstractmethod
    def problem(self, rng: random.Random) -> Row:
        """A random problem: `prompt` and the fields that `score` reads."""

    @abstractmethod
    def paint(self, row: Mapping[str, Any], rng: random.Random) -> np.ndarray:
        """A random picture of a problem, uint8 `[H, W, 3]`."""

    @abstractmethod
    def split(self, row: Mapping[str, Any], picture: np.ndarray) -> Split:
        """The split that a drawing belongs to, whatever settings and seed it was drawn with."""

    @classmethod
    @abstractmethod
    def score(cls, row: Mapping[str, Any], picture: np.ndarray, graded: bool) -> float:
        """Reward in [0, 1] of float32 `[H, W, 3]` (see `checked`) for a row's fields; 1 for every clean drawing.

        `graded` gives credit for a part; otherwise it is 1 or 0.
        """

    def rows(self, size: int, seed: int = 0, split: Split = "train") -> list[Row]:
        """`size` drawings of one split; fewer of the same seed are the first of more.

        A row has `id`, `task`, `prompt`, `image` (uint8 `[H, W, 3]`) and the fields that `score` reads.

        Raises:
            DataError: the split has hardly any drawings under these settings.
        """
        kind = kind_of(self)
        rng = random.Random(f"{kind} {split} {seed}")
        rows: list[Row] = []
        misses = 0
        while len(rows) < size:
            row = self.problem(rng)
            picture = self.paint(row, rng)
            if self.split(row, picture) != split:
                misses += 1
                # A split holds a fourteenth of all drawings or more, or none.
                if misses > 1000 + 200 * len(rows):
                    raise DataError(
                        f"prompts.split: task {kind!r} has no drawings in the split {split!r}; take another split"
                    )
                continue
            rows.append({"id": f"{kind}-{split}-{seed}-{len(rows)}", "task": kind, **row, "image": picture})
        return rows


def hashed_split(key: bytes) -> Split:
    """`train`, `validation` or `test` (8 : 1 : 1) by a hash."""
    tenth = int.from_bytes(hashlib.sha256(b"drawing " + key).digest()[:8]) % 10
    return "train" if tenth < 8 else SPLITS[tenth - 7]


def checked(completion: object) -> np.ndarray | None:
    """A picture as rewards read it: float32 `[H, W, 3]` clipped to 0..1; None where a value is not a number.

    Raises:
        DataError: it has not the form of a picture.
    """
    if isinstance(completion, str):
        raise DataError("rewards of drawings score pictures; this policy answers with text: choose another verifier")
    picture = np.asarray(completion, dtype=np.float32)
    if picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape) < 3:
        raise DataError(f"a picture has the shape [height, width, 3]; this one has {list(picture.shape)}")
    return None if np.isnan(picture).any() else picture.clip(0, 1)
