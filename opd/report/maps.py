"""What a curriculum found out about its prompts, as points of a map: one map for each of its rounds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from opd.files.run_directory import lines
from opd.report.curves import number
from opd.report.rows import evenly

POINTS = 1500
"""Of a map; of more prompts so many are shown, evenly, and all are counted."""
GROUPS = ("unreliable", "reliable", "drawn")


def maps(path: Path) -> list[dict[str, Any]]:
    """The rounds in curriculum.jsonl: `round`, how many prompts were `judged`, `reliable` and `drawn`, and of each
    point shown `reliability`, `disagreement` (None where the student was not asked) and `group`, an index into
    `GROUPS`."""
    return _maps(path, path.stat().st_size) if path.exists() else []


@functools.lru_cache(maxsize=16)
def _maps(path: Path, size: int) -> list[dict[str, Any]]:
    rounds: dict[int, list[dict[str, Any]]] = {}
    for line in lines(path):
        row = line.record
        if row is not None and isinstance(row.get("round"), int) and number(row.get("reliability")) is not None:
            rounds.setdefault(row["round"], []).append(row)
    return [{"round": name, **_points(rows)} for name, rows in sorted(rounds.items())]


def _points(rows: list[dict[str, Any]]) -> dict[str, Any]:
    shown = evenly(rows, POINTS)
    return {
        "judged": len(rows),
        "reliable": sum(bool(row.get("reliable")) for row in rows),
        "drawn": sum(bool(row.get("drawn")) for row in rows),
        "reliability": [number(row["reliability"]) for row in shown],
        "disagreement": [number(row.get("disagreement")) for row in shown],
        "group": [2 if row.get("drawn") else int(bool(row.get("reliable"))) for row in shown],
    }
