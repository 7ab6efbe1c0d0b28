"""Files that are whole or not there, and the lock of a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from opd.errors import RunError
from opd.files.ours import FILLING, refuse_foreign, remove

HOLDER = r"(\d+ on [^\n]*\n)?"
"""What the lock of a run directory holds."""


def main_process() -> bool:
    """Whether this process writes for all; known from the launcher, before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def local_main_process() -> bool:
    """Whether this process does what is done once on each machine; known from the launcher too."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def flush(path: Path) -> None:
    """Have a file's or a folder's content on the disk when this returns."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def attempt(what: str, write: Callable[[], object]) -> list[str]:
    """Write a part that others can do without; a sentence when it fails."""
    try:
        write()
        return []
    except Exception as error:
        return [f"{what} could not be written ({told(error)})"]


def told(error: Exception) -> str:
    """An error of any library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}".rstrip(": ")


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a file at once: a reader, or a crash, meets the old content or the new one.

    It is written beside, as `.NAME.PROCESS`, since several processes may write one file at the same time.

    Args:
        durable: on the disk when this returns; without, a failing machine may lose it, but never half of it is seen.

    Raises:
        OSError: it cannot be written; the old content is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)


@contextmanager
def whole_folder(target: Path, known: Collection[str] = ()) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` when the block ends.

    It lies beside `target` as `.NAME.partial`. After an error nothing of it remains; after a crash the next write to
    the same target removes it. What it replaces goes when it is whole.

    Args:
        known: files that are ours, in a target that has no `opd.json` to list them.

    Raises:
        RunError: `target`, or what a crash left beside it, holds something that opd did not write.
    """
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    for place in (target, old):
        refuse_foreign(place, known)
    remove(partial, known)
    partial.mkdir(parents=True)
    (partial / FILLING).touch()
    try:
        yield partial
        # safetensors writes for the owner alone; whoever may read the other files may read the weights.
        mode = (partial / FILLING).stat().st_mode & 0o777
        (partial / FILLING).unlink()
        for path in (*partial.rglob("*"), partial):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)
            flush(path)
        if target.exists():
            remove(old, known)
            target.rename(old)
        partial.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    with suppress(OSError):
        remove(old, known)


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
        raise _not_writable(directory, str(error.strerror)) from None
    with file:
        _hold(file, directory, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def check_lockable(directory: Path) -> None:
    """Raise `RunError` where `locked` would; nothing is made or written."""
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not place.is_dir():
        raise _not_writable(directory, os.strerror(errno.ENOTDIR))
    if not os.access(place, os.W_OK | os.X_OK):
        raise _not_writable(directory, os.strerror(errno.EACCES))
    lock = directory / ".lock"
    if lock.is_file():
        with lock.open(encoding="utf-8") as file:
            _hold(file, directory, fcntl.LOCK_SH)


def _hold(file: TextIO, directory: Path, how: int) -> None:
    """Take the lock of a run directory until its file is closed; raises as `locked` does."""
    file.seek(0)
    if not re.fullmatch(HOLDER, file.read()):
        raise RunError(f"{directory / '.lock'} was not written by opd; choose another directory with output=PATH")
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunError(
            f"{directory} is being written by process {file.read().strip() or '(unknown)'}; "
            "wait for it, stop it, or choose another directory with output=PATH"
        ) from None


def _not_writable(directory: Path, why: str) -> RunError:
    return RunError(f"cannot write to the run directory {directory} ({why}); set output=PATH")
