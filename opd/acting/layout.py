"""What a policy over action tokens is made of, as its folder says it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd.acting.seeing import ActionTokens, Body, Numbers, Statistics
from opd.errors import ModelError, nearest

CONFIG, STATISTICS = "policy.json", "dataset_statistics.json"
MODEL_TYPE = "opd_action_tokens"


@dataclass(frozen=True)
class Tower:
    """One vision transformer of transformers: `siglip` or `dinov2` (with registers), read behind its last layer but
    one, as OpenVLA's are."""

    kind: str
    width: int
    layers: int
    heads: int
    feed_forward: int


@dataclass(frozen=True)
class Layout:
    """The sequence that OpenVLA-OFT reads: `<s>`, patches of the pictures, numbers of the body, the instruction's
    tokens, M placeholders of zeros, `</s>`; attention goes both ways, and the logits of token m are read one place
    before its placeholder.

    Attributes:
        width, layers, heads, feed_forward: of the language model's layers (Llama).
        vocabulary: ids of the embedding and the head; those behind `words` pad it.
        words: ids of the tokenizer; the last K of them are the actions.
        cameras, pixels, patch: pictures of an observation, their side, and that of a patch.
        proprio, state: P and S numbers that the policy reads; one of them may be 0. A policy that reads the state is
            privileged.
        chunk: H, actions of a decision.
        dimensions: A, numbers of an action.
        bins: K.
        towers: vision transformers whose features stand side by side; none are patches as they are.
        begin, stop: ids of `<s>` and `</s>`.
        queries: the placeholders are learnt and read themselves, in place of OpenVLA-OFT's zeros that are read one
            place before: zeros are told apart by their positions alone, for which a small model has too few layers.
    """

    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    words: int
    chunk: int
    dimensions: int
    bins: int
    cameras: int = 0
    pixels: int = 0
    patch: int = 8
    proprio: int = 0
    state: int = 0
    towers: tuple[Tower, ...] = ()
    begin: int = 1
    stop: int = 2
    queries: bool = False

    def __post_init__(self) -> None:
        if self.cameras and self.pixels % self.patch:
            raise ModelError(f"pictures of {self.pixels} pixels cannot be cut into patches of {self.patch}")
        if not (self.cameras or self.proprio or self.state):
            raise ModelError("the policy would see nothing; give it pictures, proprio or state")
        if self.bins < 2 or self.bins >= self.words:
            raise ModelError(f"bins is {self.bins} with {self.words} ids; give 2 or more, and fewer than there are ids")

    @property
    def tokens(self) -> int:
        """M, action tokens of a decision."""
        return self.chunk * self.dimensions

    @property
    def patches(self) -> int:
        """Of all pictures of an observation."""
        return self.cameras * (self.pixels // self.patch) ** 2 if self.cameras else 0

    @property
    def actions(self) -> ActionTokens:
        return ActionTokens(self.bins, self.words)

    def misfit(self, body: Body) -> str | None:
        """Why a policy of this layout cannot act in an environment, or None."""
        if self.dimensions != body.dimensions:
            return f"its actions have {self.dimensions} numbers and the environment's {body.dimensions}"
        for name in ("cameras", "pixels", "proprio", "state"):
            own, theirs = getattr(self, name), getattr(body, name)
            if own and own != theirs and (name != "pixels" or self.cameras):
                return f"it reads {name}: {own} and the environment shows {theirs}"
        return None

    def write(self, folder: Path) -> None:
        data = {"model_type": MODEL_TYPE, **asdict(self)}
        (folder / CONFIG).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Layout:
        """Of a folder that `write` wrote.

        Raises:
            ModelError: no such folder, or another kind of model.
        """
        data = read_json(folder / CONFIG, folder)
        if data.pop("model_type", None) != MODEL_TYPE:
            raise ModelError(f"model '{folder}' is no policy over action tokens; opd create-policy writes a blank one")
        try:
            return Layout(**data | {"towers": tuple(Tower(**tower) for tower in data.get("towers", ()))})
        except TypeError as error:
            raise ModelError(f"model '{folder}' cannot be loaded ({CONFIG}: {error})") from None


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """A file of a model's folder.

    Raises:
        ModelError: it is missing or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ModelError(
            f"model '{folder}' cannot be loaded ({path.name}: {reason}); give the folder of a policy over action "
            "tokens (opd create-policy writes a blank one)"
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"model '{folder}' cannot be loaded ({path.name}: not a mapping)")
    return found


def write_statistics(folder: Path, statistics: Statistics) -> None:
    """`dataset_statistics.json` with the keys that OpenVLA's checkpoints have."""
    action = {"q01": list(statistics.low), "q99": list(statistics.high), "mask": list(statistics.scaled)}
    seen = {name: {"q01": list(low), "q99": list(high)} for name, (low, high) in statistics.seen.items()}
    text = json.dumps({statistics.key: {"action": action, **seen}}, indent=1) + "\n"
    (folder / STATISTICS).write_text(text, encoding="utf-8")


def read_statistics(folder: Path, key: str | None = None, bounds: str = "quantiles") -> Statistics:
    """The statistics of one data set among those that a checkpoint names.

    Args:
        key: which (`unnorm_key`); it may be left out where there is one.
        bounds: `quantiles` (q01, q99) or `extremes` (min, max), what becomes -1 and 1.

    Raises:
        ModelError: no such file, data set or numbers.
    """
    found = read_json(folder / STATISTICS, folder)
    if key is None and len(found) == 1:
        (key,) = found
    if key is None or key not in found:
        wrong = "" if key is None else f"{key!r} is none of them{nearest(key, found)}: "
        raise ModelError(
            f"model '{folder}' has action statistics of several data sets; {wrong}set statistics to one of "
            f"{', '.join(sorted(found)[:8])}"
        )
    names = ("q01", "q99") if bounds == "quantiles" else ("min", "max")
    try:
        action = found[key]["action"]
        low, high = (_numbers(action[name]) for name in names)
        scaled = tuple(bool(each) for each in action.get("mask", [True] * len(low)))
        seen = {
            name: (_numbers(found[key][name][names[0]]), _numbers(found[key][name][names[1]]))
            for name in ("proprio", "state")
            if name in found[key]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model '{folder}': statistics of {key!r} lack numbers ({error})") from None
    if not len(low) == len(high) == len(scaled):
        raise ModelError(f"model '{folder}': statistics of {key!r} have {len(low)} low and {len(high)} high numbers")
    return Statistics(key, low, high, scaled, seen)


def _numbers(values: Sequence[float]) -> Numbers:
    return tuple(float(value) for value in values)
