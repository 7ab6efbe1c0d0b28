"""What a frozen teacher said before, on disk: a second epoch, another seed or a sweep never asks it twice."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from opd.choice import Settings
from opd.errors import RunError
from opd.files.whole import write_whole
from opd.language.engines.base import EncodedPrompt, PromptInputs, ids_of
from opd.language.source import cache_folder

OWN = re.compile(r"[0-9a-f]{64}")
"""Name of an answer's file."""


class MemorySettings(Settings):
    """Where answers are kept, and how many."""

    path: str | None = Field(None, description="Folder; default answers/ in $OPD_CACHE or ~/.cache/opd")
    gigabytes: float = Field(8.0, gt=0, description="Of 1e9 bytes, over all teachers; the longest unused go first")


class Memory:
    """Answers by content: the teacher, the exact ids that it saw and those that it was asked about.

    One file an answer, written beside and renamed, so that several runs may share a folder. Reading one marks it as
    used; when the folder has grown past its bound the longest unused are deleted down to nine tenths of it.

    Args:
        settings: of the recipe.
        teacher: what the answers depend on besides the ids: weights, dtype.
    """

    def __init__(self, settings: MemorySettings, teacher: str):
        self.folder = Path(settings.path).expanduser() if settings.path else cache_folder() / "answers"
        self.bound = int(settings.gigabytes * 1e9)
        self.teacher = teacher
        self._size: int | None = None

    def path(self, context: EncodedPrompt, actions: torch.Tensor) -> Path:
        """The file of one answer."""
        key = hashlib.sha256(f"{self.teacher} {len(context)}\n".encode())
        for ids in (ids_of(context), actions):
            key.update(ids.detach().cpu().long().contiguous().numpy().data)
        for part, value in sorted(context.inputs.items()) if isinstance(context, PromptInputs) else ():
            held = value.detach().cpu().contiguous()
            key.update(f"{part} {held.dtype} {tuple(held.shape)}\n".encode())
            key.update(held.view(torch.uint8).numpy().data)
        name = key.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def recall(self, paths: Sequence[Path]) -> list[torch.Tensor | None]:
        """The hidden states `[T, D]` in each file, or None where there is none that can be read."""
        return [self._read(path) for path in paths]

    def _read(self, path: Path) -> torch.Tensor | None:
        try:
            hidden = load_file(path)["hidden"]
            os.utime(path)
        except (OSError, SafetensorError, KeyError):
            return None
        return hidden

    def keep(self, path: Path, hidden: torch.Tensor) -> None:
        """Write one answer, and make room when the folder is full."""
        data = save({"hidden": hidden.detach().cpu().contiguous()})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"teacher.cache: cannot keep answers in {self.folder} ({error.strerror}); set teacher.cache.path"
            ) from None
        # A lost answer is asked for again.
        write_whole(path, data, durable=False)
        if self._size is None:
            self._size = sum(file.stat().st_size for file in self._files())
        else:
            self._size += len(data)
        if self._size > self.bound:
            self._make_room()

    def _files(self) -> list[Path]:
        # The folder is anybody's, and there may be other files in it.
        found = self.folder.glob("[0-9a-f][0-9a-f]/*.safetensors")
        return [p for p in found if OWN.fullmatch(p.stem) and p.stem[:2] == p.parent.name and not p.parent.is_symlink()]

    def _make_room(self) -> None:
        """Others may write and delete here at the same time, so the folder is looked at anew."""
        found = []
        for file in self._files():
            try:
                state = file.stat()
            except FileNotFoundError:
                continue
            found.append((state.st_mtime_ns, state.st_size, file))
        size = sum(each for _, each, _ in found)
        for _, each, file in sorted(found):
            if size <= 0.9 * self.bound:
                break
            file.unlink(missing_ok=True)
            size -= each
        self._size = size
