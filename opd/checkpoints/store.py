"""One checkpoint on the disk: a folder that is whole or not there, with a manifest of what is in it.

    checkpoints/step-00000050/
        manifest.json         format, step, recipe, ...; bytes and sha256 of the other files; a sha256 of itself
        state.json            the tree of the run's state, with references in place of tensors
        tensors.safetensors   the tensors

Nothing is pickled, so reading a checkpoint runs no code of whoever wrote it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opd.checkpoints.tree import flatten, unflatten
from opd.errors import RunError
from opd.files.whole import whole_folder

FORMAT = 1
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
FILES = (MANIFEST, STATE, TENSORS)
LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|old)")
"""What a crash leaves half written or half removed: no checkpoint, but as large as one."""


class UnusableError(RunError):
    """A checkpoint that is damaged, or is none of this version's."""


def folder_of(directory: Path, step: int) -> Path:
    return directory / "checkpoints" / f"step-{step:08}"


def steps_stored(directory: Path) -> list[int]:
    """Steps that a run directory has a checkpoint of, newest first; what is in them is not looked at."""
    names = [path.name for path in (directory / "checkpoints").glob("step-*")]
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name)), reverse=True)


def write(folder: Path, facts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Store `state` (see `tree`) and the plain `facts` about it; the folder appears when it is complete.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing new is left behind.
    """
    structure, tensors = flatten(state)
    with whole_folder(folder, FILES) as partial:
        try:
            save_file(tensors, partial / TENSORS)
        except SafetensorError as error:
            raise OSError(None, str(error)) from None
        (partial / STATE).write_text(json.dumps(structure), encoding="utf-8")
        files = {name: {"bytes": (partial / name).stat().st_size, "sha256": _hash(partial / name)} for name in _PARTS}
        content = {"format": FORMAT, **facts, "files": files}
        manifest = {"sha256": _hash_of(content), "content": content}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint of which every byte is as it was written.

    Raises:
        UnusableError: with the file and what is wrong with it.
    """
    content = facts_of(folder)
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise UnusableError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise UnusableError(f"{path} has {size} bytes instead of {expected['bytes']}")
        if _hash(path) != expected["sha256"]:
            raise UnusableError(f"{path} is damaged: its sha256 is not the manifest's")
    return content


def facts_of(folder: Path) -> dict[str, Any]:
    """The facts alone, with the manifest itself verified.

    Raises:
        UnusableError: no manifest, a damaged one, or another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        content, digest = manifest["content"], manifest["sha256"]
    except FileNotFoundError:
        raise UnusableError(
            f"{folder} has no {MANIFEST}: it is no checkpoint, or its removal was interrupted"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UnusableError(f"{path} cannot be read") from None
    if _hash_of(content) != digest:
        raise UnusableError(f"{path} is damaged: its sha256 is another")
    if content.get("format") != FORMAT:
        raise UnusableError(f"{folder} has format {content.get('format')!r}; this version of opd reads {FORMAT}")
    if folder.name != f"step-{content['step']:08}":
        raise UnusableError(f"{folder} holds step {content['step']}: it was renamed")
    return content


def read(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint that `verify` found sound; tensors on the CPU, in memory of their own."""
    structure = json.loads((folder / STATE).read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(folder / TENSORS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensors[name] = file.get_tensor(name).clone()
    state: dict[str, Any] = unflatten(structure, tensors)
    return state


_PARTS = (STATE, TENSORS)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
