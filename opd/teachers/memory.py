"""What a frozen teacher said before, on disk: a second epoch, another seed or a sweep never asks it twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from opd.choice import Settings
from opd.files.bounded import BoundedFolder
from opd.language.engines.base import EncodedPrompt, PromptInputs, ids_of
from opd.language.source import cache_folder


class MemorySettings(Settings):
    """Where answers are kept, and how many."""

    path: str | None = Field(None, description="Folder; default answers/ in $OPD_CACHE or ~/.cache/opd")
    gigabytes: float = Field(8.0, gt=0, description="Of 1e9 bytes, over all teachers; the longest unused go first")


class Memory:
    """Answers by content: the teacher, the exact ids that it saw and those that it was asked about; a file each in a
    `BoundedFolder`.

    Args:
        settings: of the recipe.
        teacher: what the answers depend on besides the ids: weights, dtype.
    """

    def __init__(self, settings: MemorySettings, teacher: str):
        place = Path(settings.path).expanduser() if settings.path else cache_folder() / "answers"
        self.files = BoundedFolder(place, settings.gigabytes, ".safetensors", "teacher.cache")
        self.teacher = teacher

    def path(self, context: EncodedPrompt, actions: torch.Tensor) -> Path:
        """The file of one answer."""
        key = hashlib.sha256(f"{self.teacher} {len(context)}\n".encode())
        for ids in (ids_of(context), actions):
            key.update(ids.detach().cpu().long().contiguous().numpy().data)
        for part, value in sorted(context.inputs.items()) if isinstance(context, PromptInputs) else ():
            held = value.detach().cpu().contiguous()
            key.update(f"{part} {held.dtype} {tuple(held.shape)}\n".encode())
            key.update(held.view(torch.uint8).numpy().data)
        return self.files.path(key.hexdigest())

    def recall(self, paths: Sequence[Path]) -> list[torch.Tensor | None]:
        """The hidden states `[T, D]` in each file, or None where there is none that can be read."""
        return [self._read(path) for path in paths]

    def _read(self, path: Path) -> torch.Tensor | None:
        try:
            hidden = load_file(path)["hidden"]
            self.files.used(path)
        except (OSError, SafetensorError, KeyError):
            return None
        return hidden

    def keep(self, path: Path, hidden: torch.Tensor) -> None:
        """Write one answer, and make room when the folder is full."""
        self.files.keep(path, save({"hidden": hidden.detach().cpu().contiguous()}))
