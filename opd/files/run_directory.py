"""Reads what a run has written, also while it is still writing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd.errors import RunError


@dataclass(frozen=True)
class Line:
    """One line of a .jsonl file: its first byte, the byte after it, and its object (None if it holds none)."""

    start: int
    end: int
    record: dict[str, Any] | None


def lines(path: Path, start: int = 0, limit: int | None = None) -> Iterator[Line]:
    """The lines of a .jsonl file from byte `start` on, until about `limit` bytes were read.

    A last line that is still being written is left for later: reading goes on from the previous line's end. A file that
    does not exist (yet) has no lines.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror}); check the permissions of the run directory") from None
    with file:
        file.seek(start)
        at = start
        for raw in file:
            record = _object(raw)
            if record is None and not raw.endswith(b"\n"):
                return
            line = Line(at, at + len(raw), record)
            at = line.end
            if raw.strip():
                yield line
            if limit is not None and at - start >= limit:
                return


def check_run(directory: Path, needs_metrics: bool = True) -> None:
    """Refuse what is no run directory, with the fix.

    Raises:
        RunError: no such directory, or (with `needs_metrics`) nothing logged in it.
    """
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise RunError(f"run directory {directory} {problem}; give the directory that opd train wrote (its output)")
    if needs_metrics and not any(line.record for line in lines(directory / "metrics.jsonl")):
        raise RunError(f"{directory} has no metrics in metrics.jsonl; start the run with opd train, then report on it")


def read_yaml(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and content; empty where the file is absent or is no mapping."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        data = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, RecursionError):
        return "", {}
    return text, data if isinstance(data, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Content; empty where the file is absent, half-written or no object."""
    try:
        return _object(path.read_bytes()) or {}
    except OSError:
        return {}


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
