"""What an agent with a body sees, how its actions are measured, and what an expert says of them. NumPy alone: the
processes of simulators import this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from opd.errors import IncompatibleError

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Seen:
    """One observation.

    Attributes:
        images: uint8 `[C, H, W, 3]`, a picture of each camera; C may be 0.
        proprio: float32 `[P]`, what a body knows of itself; P may be 0.
        state: float32 `[S]`, what the simulator knows; a privileged teacher sees it. S may be 0.
    """

    images: np.ndarray
    proprio: np.ndarray
    state: np.ndarray


NO_PICTURE = np.zeros((0, 0, 0, 3), np.uint8)
REACH = 5.0
"""How far a number may lie from the middle of its data, in halves of their range."""
STILL = 1e-3
"""A number that varies by less in all data is constant."""


@dataclass(frozen=True)
class Body:
    """How an environment is seen and moved.

    Attributes:
        low, high: A bounds of an action.
        cameras, pixels: pictures of an observation and their side.
        proprio, state: P and S.
    """

    low: Numbers
    high: Numbers
    cameras: int = 0
    pixels: int = 0
    proprio: int = 0
    state: int = 0

    @property
    def dimensions(self) -> int:
        """A."""
        return len(self.low)


@dataclass(frozen=True)
class Plan:
    """What an expert would do next, open loop: float32 `[H, A]` means in the environment's own units, and standard
    deviations by which it would not mind missing them."""

    mean: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """How the actions of a data set become numbers in -1..1 and back. Student and teacher must have the same: a token
    means another movement otherwise.

    Attributes:
        key: of the data set, as checkpoints name it (`unnorm_key`).
        low, high: A numbers that become -1 and 1: the 1st and 99th percentile, or the smallest and largest.
        scaled: A marks; a dimension without it (a gripper that is open or closed) is taken as it is.
        seen: of `proprio` and `state` what becomes -1 and 1 where a policy reads them; what is not here is read as it
            is. Student and teacher may differ in it.
    """

    key: str
    low: Numbers
    high: Numbers
    scaled: tuple[bool, ...]
    seen: Mapping[str, tuple[Numbers, Numbers]] = field(default_factory=dict)

    @staticmethod
    def of(body: Body, key: str) -> Statistics:
        """Those of an environment's own bounds."""
        return Statistics(key, body.low, body.high, (True,) * body.dimensions)

    def scale(self, actions: np.ndarray) -> np.ndarray:
        """float64 `[..., A]` in -1..1, clipped."""
        low, high = np.array(self.low), np.array(self.high)
        scaled = 2 * (actions - low) / (high - low + 1e-8) - 1
        return np.where(self.scaled, scaled, actions).clip(-1, 1)

    def unscale(self, scaled: np.ndarray) -> np.ndarray:
        """float64 `[..., A]` in the environment's units."""
        low, high = np.array(self.low), np.array(self.high)
        return np.where(self.scaled, 0.5 * (scaled + 1) * (high - low + 1e-8) + low, scaled)

    def read(self, name: str, values: np.ndarray) -> np.ndarray:
        """float32 `[..., P]` or `[..., S]` of observations, as a policy reads them. Between `low` and `high` lie the
        data; a state that the policy reached itself may lie outside, up to `REACH`."""
        if name not in self.seen:
            return values
        low, high = (np.array(bound) for bound in self.seen[name])
        # A number that never varied says nothing of its scale.
        half = np.where(high - low > STILL, (high - low) / 2, 1.0)
        return ((values - (low + high) / 2) / half).clip(-REACH, REACH).astype(np.float32)

    def check(self, other: Statistics, whose: str) -> None:
        """Raise `IncompatibleError` where the same token would be another movement to `other`."""
        if len(other.low) != len(self.low):
            raise IncompatibleError(
                f"the student's actions have {len(self.low)} dimensions and those of {whose} {len(other.low)}; take "
                "one that was made for the same body"
            )
        apart = [
            i
            for i in range(len(self.low))
            if self.scaled[i] != other.scaled[i]
            or (self.scaled[i] and not np.allclose([self.low[i], self.high[i]], [other.low[i], other.high[i]]))
        ]
        if apart:
            i = apart[0]
            raise IncompatibleError(
                f"action statistics differ: dimension {i} goes from {self.low[i]:g} to {self.high[i]:g} for the "
                f"student ({self.key!r}) and from {other.low[i]:g} to {other.high[i]:g} for {whose} ({other.key!r}), "
                "so one token is two movements; take a teacher with the student's statistics"
            )


@dataclass(frozen=True)
class ActionTokens:
    """Actions as the last K ids of a vocabulary, as OpenVLA writes them.

    Each dimension in -1..1 is cut by K equally spaced edges; bin b lies between edges b and b + 1, the last one takes 1
    itself alone. Token id = `vocabulary - 1 - bin`; the value of a bin is its centre, and of the last that of the last
    but one.
    """

    bins: int
    vocabulary: int

    @property
    def edges(self) -> np.ndarray:
        return np.linspace(-1, 1, self.bins)

    @property
    def centres(self) -> np.ndarray:
        """float64 `[K - 1]`."""
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2

    @property
    def ids(self) -> range:
        """The K ids, ascending, so bins descending."""
        return range(self.vocabulary - self.bins, self.vocabulary)

    def encode(self, scaled: np.ndarray) -> np.ndarray:
        """int64 ids of numbers in -1..1 (others are clipped)."""
        return self.vocabulary - np.digitize(np.clip(scaled, -1, 1), self.edges).astype(np.int64)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """float64 numbers in -1..1."""
        return self.centres[np.clip(self.vocabulary - 1 - ids, 0, self.bins - 2)]

    def log_probs(self, mean: np.ndarray, spread: np.ndarray, floor: float = 1e-4) -> np.ndarray:
        """float32 `[..., K]` in the order of `ids`: a Gaussian over scaled values, cut into bins; what lies outside of
        -1..1 goes to the outer bins, and `floor` of the mass to all alike, so that no token is impossible."""
        from scipy.special import ndtr

        inner = self.edges[1:-1]
        below = ndtr((inner - mean[..., None]) / spread[..., None])
        ends = np.zeros_like(below[..., :1])
        mass = np.diff(np.concatenate([ends, below, ends + 1], -1), axis=-1)
        # The last bin, of 1 alone, is the movement of the one before it.
        mass = np.concatenate([mass[..., :-1], mass[..., -1:] / 2, mass[..., -1:] / 2], -1)
        mass = (1 - floor) * mass + floor / self.bins
        return np.log(mass[..., ::-1]).astype(np.float32)
