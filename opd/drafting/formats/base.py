"""What a format of drafters is, and how a folder of one is written and compared."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from opd.drafting.base import Drafter
from opd.errors import ModelError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""The two files of every format."""


@dataclass(frozen=True)
class Made:
    """A drafter, and what formats say of its target.

    Attributes:
        drafter: in any mode, on any device.
        embedding: `[V, D]`, the target's, detached.
        head: `[V, D]`, the weight of the target's output head, detached.
        target: its hub name, or its folder.
        architectures: what the target's config calls its classes.
        revision: branch, tag or commit of the target on the hub; None for the hub's default.
    """

    drafter: Drafter
    embedding: torch.Tensor
    head: torch.Tensor
    target: str
    architectures: tuple[str, ...]
    revision: str | None = None


class Format(ABC):
    """One format; it holds nothing.

    Attributes:
        library: who loads it.
        servers: names of `opd.drafting.servers` whose reading is checked before anything is written.
    """

    library: ClassVar[str]
    servers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def weights(self, of: Made) -> dict[str, torch.Tensor]:
        """The tensors by their names in this format.

        Raises:
            ModelError: it has no place for drafters of this form.
        """

    @abstractmethod
    def config(self, of: Made) -> dict[str, Any]:
        """What `config.json` says."""

    def no_place(self, of: Made, instead: str) -> ModelError:
        """The refusal of a form; `instead` says what to do."""
        return ModelError(f"--as {self.library} has no place for a {type(of.drafter).__name__}: {instead}")


def write(folder: Path, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write the weights, then the config.

    Raises:
        OSError, SafetensorError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def difference(folder: Path, weights: Mapping[str, torch.Tensor]) -> str | None:
    """How a saved drafter differs from the live one, whose tensors these are; None where every one is the same."""
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        names = set(stored.keys())
        for name, value in weights.items():
            if name not in names or not torch.equal(stored.get_tensor(name), value.detach().cpu()):
                return f"{name} in {folder} is not that of the trained drafter"
    return None
