"""Shards: safetensors files that appear whole or not at all, a checksum beside each, and claims on those to come."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from opd.errors import DataError, RunError
from opd.files.whole import write_whole


def write_in_store(path: Path, data: bytes) -> None:
    """`write_whole` of a store's file, in a folder that may not be there yet; raises `RunError` where it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}); free some space or choose another place") from None


def checksum_file(path: Path) -> Path:
    """The file beside a shard that holds its checksum in the form of `sha256sum`; without it the shard is not there."""
    return path.with_name(f"{path.name}.sha256")


def is_written(path: Path) -> bool:
    return path.is_file() and checksum_file(path).is_file()


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors (on any device) as one shard and its checksum; equal tensors give equal bytes."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_in_store(path, data)
    write_in_store(checksum_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())


def recorded_checksum(path: Path) -> str:
    return checksum_file(path).read_text(encoding="utf-8").split()[0]


def check_shard(path: Path) -> None:
    """Raise `DataError` when the bytes of a shard are not those that were written."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != recorded_checksum(path):
        raise DataError(f"{path} is damaged: its bytes do not match {checksum_file(path).name}")


def write_json(path: Path, value: object) -> None:
    write_in_store(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


@contextmanager
def claim(path: Path, written: Callable[[Path], bool] = is_written) -> Iterator[bool]:
    """Whether this process alone may write the shard `path` now: nobody else does, and it is not `written` yet.

    A claim is a lock that the kernel gives back when its process ends, however it ends. The workers of one store need a
    file system whose locks reach all of them.
    """
    lock = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # The worker before may have taken the file away between our opening and our locking it.
        if not lock.exists() or os.fstat(handle).st_ino != lock.stat().st_ino:
            yield False
            return
        try:
            if not written(path):
                for left_over in path.parent.glob(f".{path.name}*.[0-9]*"):
                    left_over.unlink()
                yield True
            else:
                yield False
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def tidy(folder: Path, written: Callable[[Path], bool] = is_written) -> None:
    """Take away the locks of workers that were killed after their shard was complete."""
    for lock in folder.glob(".*.lock"):
        with claim(folder / lock.name.removeprefix(".").removesuffix(".lock"), written):
            pass


class Shard:
    """One written shard, open and memory-mapped. `lengths` int64 `[B]` says how many positions each row owns."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
            self.lengths = self.tensor("lengths").long()
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is damaged: {str(error).splitlines()[0][:160]}") from None
        self.starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        self._of_rows: dict[str, torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def of_rows(self, name: str) -> torch.Tensor:
        """A tensor with an entry a row, read once."""
        if name not in self._of_rows:
            self._of_rows[name] = self.tensor(name)
        return self._of_rows[name]

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries `start:stop` of a tensor; nothing else is read."""
        return self._file.get_slice(name)[start:stop]

    def positions(self, name: str, row: int) -> torch.Tensor:
        """What one row owns of a tensor with an entry a position."""
        start = self.starts[row]
        return self.slice(name, start, start + int(self.lengths[row]))


def check_of(*parts: torch.Tensor, before: int = 0) -> int:
    """CRC-32 of the bytes of a row's tensors, after those of `before`."""
    value = before
    for part in parts:
        value = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
