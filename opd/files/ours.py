"""What in a folder `opd` wrote: nothing else is ever removed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from opd.errors import OVERWRITE, RunError

LIST = "opd.json"
"""Says in `files` what `opd` wrote into the folder of a model."""

FILLING = ".opd-filling"
"""Stands in a folder that is being filled, and goes before it takes its place."""


def entries(folder: Path) -> Iterator[str]:
    """Files, links and empty folders below a folder, as relative paths; links are named and not followed."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        names = [*files, *links]
        if not names and not folders and here != folder:
            yield here.relative_to(folder).as_posix()
        for name in names:
            yield (here / name).relative_to(folder).as_posix()


def listed(folder: Path) -> set[str]:
    """The files that a folder's `opd.json` says are ours; none where it says nothing."""
    try:
        files = json.loads((folder / LIST).read_text(encoding="utf-8"))["files"]
        return {LIST, *(str(name) for name in files)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def foreign(folder: Path, known: Collection[str] = ()) -> list[str]:
    """What lies in a folder, or at its place, and is not ours, with the folder's own path; sorted.

    Args:
        known: files that are ours besides those that the folder lists.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return [str(folder)]
    if not folder.exists() or (folder / FILLING).is_file():
        return []
    ours = {*known, *listed(folder)}
    # A link that stands where our file was is somebody's.
    return sorted(str(folder / name) for name in entries(folder) if name not in ours or (folder / name).is_symlink())


def refuse_foreign(folder: Path, known: Collection[str] = ()) -> None:
    """Raise `RunError` for a folder that cannot be replaced without losing what is not ours."""
    found = foreign(folder, known)
    if found:
        raise RunError(
            f"{folder} cannot be replaced: {named(found)} was not written by opd; move it away or choose another folder"
        )


def refuse_taken(folder: Path, overwrite: bool) -> None:
    """Raise `RunError` for a folder that a model cannot be written to as a whole: the working directory, or one that
    holds something, unless that is ours and `overwrite` is asked for."""
    place = folder.resolve()
    if any(place in (other.resolve(), *other.resolve().parents) for other in (Path.cwd(), Path.home())):
        raise RunError(f"{folder} holds the working directory or the home folder; choose a folder of its own")
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not empty; choose another folder, or pass {OVERWRITE}")
    refuse_foreign(folder)


def named(found: list[str]) -> str:
    """The first of several paths, and how many more there are."""
    return found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def remove(folder: Path, known: Collection[str] = ()) -> None:
    """Remove a folder of which all is ours.

    Raises:
        RunError: something in it is not; nothing was removed.
    """
    refuse_foreign(folder, known)
    if folder.is_dir():
        # What says that the rest is ours goes last.
        remove_files(folder, sorted(entries(folder), key=lambda name: name in (LIST, FILLING)))


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and the folders that this leaves empty."""
    folders = {folder}
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            folders.add(path)
        else:
            path.unlink(missing_ok=True)
        folders |= {parent for parent in path.parents if folder in parent.parents}
    for place in sorted(folders, key=lambda p: len(p.parts), reverse=True):
        with suppress(OSError):
            place.rmdir()
