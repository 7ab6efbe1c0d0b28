"""A folder of small files named by a hash, of which the longest unused go when it has grown past its bound."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from opd.errors import RunError
from opd.files.whole import write_whole

OWN = re.compile(r"[0-9a-f]{64}")
"""Name of a file that was put there."""


class BoundedFolder:
    """One file a name, written beside and renamed, so that several runs may share the folder. When it has grown past
    its bound the longest unused are deleted down to nine tenths of it.

    Args:
        folder: may hold other files too, and may be shared.
        gigabytes: the bound, of 1e9 bytes.
        suffix: of the files.
        key: of the recipe, where the folder is named.
    """

    def __init__(self, folder: Path, gigabytes: float, suffix: str, key: str):
        self.folder, self.bound, self.suffix, self.key = folder, int(gigabytes * 1e9), suffix, key
        self._size: int | None = None

    def path(self, name: str) -> Path:
        """The file of a name of 64 hexadecimal digits."""
        return self.folder / name[:2] / f"{name}{self.suffix}"

    def used(self, path: Path) -> None:
        """Say that a file was read; raises `OSError` where it is gone."""
        os.utime(path)

    def keep(self, path: Path, data: bytes) -> None:
        """Write one file, and make room when the folder is full."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"{self.key}: cannot keep answers in {self.folder} ({error.strerror}); set {self.key}.path"
            ) from None
        # What is lost is asked for again.
        write_whole(path, data, durable=False)
        if self._size is None:
            self._size = sum(file.stat().st_size for file in self._files())
        else:
            self._size += len(data)
        if self._size > self.bound:
            self._make_room()

    def _files(self) -> list[Path]:
        # The folder is anybody's, and there may be other files in it.
        found = self.folder.glob(f"[0-9a-f][0-9a-f]/*{self.suffix}")
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
