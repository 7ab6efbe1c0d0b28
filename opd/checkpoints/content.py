"""What a prompt set holds, as one hash: of images the pictures themselves, of files what is in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import torch
from PIL import Image

from opd.prompts import Prompt

EDGE = 64 * 2**10
"""Bytes of a file that are read at its beginning and at its end."""


def content_of(prompts: Iterable[Prompt], files: Callable[[Prompt], list[Path]]) -> str:
    """SHA-256 over ids, columns and fields of all prompts, in order, and over the `files` that they name.

    Arrays, tensors, images and bytes count with every number of theirs. A file counts by its size and its first and
    last 64 KiB, wherever it lies and whenever it was written: sets of pictures are too large to be read whole before
    each start, and a compressed picture that is another differs there. A file that is not there counts as absent.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        row = json.dumps([prompt.id, prompt.column, prompt.fields], sort_keys=True, default=_described)
        digest.update(row.encode())
        for path in files(prompt):
            digest.update(_of_file(path))
    return digest.hexdigest()


def _described(value: Any) -> str:
    """A field that is no JSON, by its kind and its content."""
    kind = type(value).__name__
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{kind} {_hash(bytes(value))}"
    if isinstance(value, Image.Image):
        try:
            return f"image {value.mode} {value.size} {_hash(value.tobytes())}"
        except Exception:
            # A decoder may raise anything about a damaged file; such a row was left out when it was read.
            return f"image {value.mode} {value.size} that cannot be read"
    if isinstance(value, torch.Tensor):
        numbers = value.detach().cpu().contiguous()
        return f"{kind} {numbers.dtype} {list(numbers.shape)} {_hash(numbers.reshape(-1).view(torch.uint8).numpy())}"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{kind} {value.dtype} {list(value.shape)} {_hash(np.ascontiguousarray(value))}"
    if isinstance(value, np.ndarray):
        return f"{kind} {list(value.shape)} {json.dumps(value.tolist(), sort_keys=True, default=_described)}"
    if isinstance(value, np.generic | date | time | timedelta | Decimal | UUID | Path | complex):
        return f"{kind} {value}"
    if isinstance(value, set | frozenset):
        return f"{kind} {sorted(json.dumps(item, sort_keys=True, default=_described) for item in value)}"
    # Of anything else no two processes need agree on how it is written.
    return kind


def _hash(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _of_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.sha256(f"{size} ".encode() + file.read(EDGE))
            file.seek(max(EDGE, size - EDGE))
            digest.update(file.read(EDGE))
    except OSError:
        return b"absent"
    return digest.digest()
