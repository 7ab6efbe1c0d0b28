"""Files that are whole or not there, and the lock of a run directory."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.errors import RunError


def main_process() -> bool:
    """Whether this process writes for all; known from the launcher, before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def flush(path: Path) -> None:
    """Have a file's or a folder's content on the disk when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, meets the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` when the block ends.

    It lies beside `target` as `.NAME.partial`. After an error nothing of it remains; after a crash the next write to
    the same target removes it.
    """
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush(path)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make a run directory and hold it against other writers.

    The lock is the kernel's and ends with the process, however that ends; the file it lies on only says who holds it.

    Raises:
        RunError: another process holds it, or the directory cannot be written.
    """
    if not main_process():
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to the run directory {directory} ({error.strerror}); set output=PATH") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{directory} is being written by process {file.read().strip() or '(unknown)'}; "
                "wait for it, stop it, or choose another directory with output=PATH"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
