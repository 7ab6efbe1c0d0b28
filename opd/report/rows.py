"""Rollouts in compact chunks that the page decodes when it shows them.

A chunk has an `index` in plain JSON (enough to list, sort and page) and its `data`: base64 of gzip of

    4 bytes: length of the header (little endian) | header, JSON | columns, int32 in byte planes

Byte planes (all lowest bytes, then all second bytes, ...) compress better than whole integers, and most of the upper
planes are zero. Texts are indices into the header's `strings`; numbers are integers divided by the column's `scale`.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opd.files.run_directory import lines
from opd.report.curves import number

CHUNK_ROWS = 64
CHUNK_TOKENS = 4096
IMAGE_LETTERS = 64
"""Letters of a picture's address that weigh as much as a token in a chunk's size."""
LAST = 2
"""Most tokens at the end of a completion that are looked for as not being in its text."""
MISSING = -(2**31)
PLAIN = (
    *("step", "id", "prompt", "completion", "finished", "reward", "task", "tokens", "values"),
    *("teacher_prompt", "teacher_answer"),
)
"""Keys of a row that the page shows by itself; every other key is for layers."""
OTHERS = frozenset({"image", "episode", "turns", "blocks"})
"""Keys of rows that are no text written in answer to a prompt."""

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """Where a row lies in its file."""

    start: int
    length: int
    step: int
    id: str


@dataclass(frozen=True)
class RowFile:
    """The rows of one file, of which only places are held: a long run's rows are larger than memory should be."""

    path: Path
    entries: tuple[Entry, ...]
    end: int
    broken: int

    @property
    def bytes(self) -> int:
        return sum(entry.length for entry in self.entries)

    def read(self, entries: Iterable[Entry]) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for entry in entries:
                file.seek(entry.start)
                yield json.loads(file.read(entry.length))


def scan(path: Path) -> RowFile:
    """List the rows of samples.jsonl or rollouts.jsonl; lines that are no row are counted as `broken`."""
    entries, end, broken = [], 0, 0
    for line in lines(path):
        end = line.end
        if line.record is not None and is_row(line.record):
            entries.append(Entry(line.start, line.end - line.start, line.record["step"], str(line.record.get("id"))))
        else:
            broken += 1
    return RowFile(path, tuple(entries), end, broken)


def is_row(record: dict[str, Any]) -> bool:
    shown = isinstance(record.get("tokens"), list) or isinstance(record.get("image"), str)
    return isinstance(record.get("step"), int) and shown


def with_tokens(record: dict[str, Any]) -> dict[str, Any]:
    """The row of a picture with its sampler's steps, from 1, in the place of tokens."""
    if isinstance(record.get("tokens"), list):
        return record
    steps = max((len(column) for column in _values(record).values() if isinstance(column, list)), default=0)
    return record | {"tokens": [str(i + 1) for i in range(steps)]}


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at even distances, first and last included."""
    if count >= len(items):
        return list(items)
    if count < 2:
        return list(items[:1])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def choose_training(entries: Sequence[Entry], share: float) -> list[Entry]:
    """About `share` of the training rows, evenly over the run."""
    return evenly(entries, math.ceil(share * len(entries)))


def choose_held_out(entries: Sequence[Entry], share: float) -> list[Entry]:
    """About `share` of the held-out rows, prompt by prompt.

    A prompt is kept with all its steps or not at all, so that before and after still show the same prompt. Only when
    that would leave fewer than eight prompts, steps between the first and the last go too.
    """
    by_id: dict[str, list[Entry]] = {}
    for entry in entries:
        by_id.setdefault(entry.id, []).append(entry)
    rows = share * len(entries)
    kept = evenly(list(by_id), max(math.ceil(share * len(by_id)), min(8, int(rows / 2)), 1))
    steps_share = min(share * len(by_id) / max(len(kept), 1), 1.0)
    chosen = []
    for name in kept:
        steps = sorted(by_id[name], key=lambda entry: entry.step)
        chosen += evenly(steps, max(2, math.ceil(steps_share * len(steps))))
    return chosen


def encode(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chunks of rows, in the order given."""
    chunks, held, tokens = [], list[dict[str, Any]](), 0
    for record in records:
        if not is_row(record):
            continue
        record = with_tokens(record)
        held.append(record)
        letters = len(str(record.get("image", ""))) + len(
            str(record.get("images", "")) + str(record.get("episode", ""))
        )
        tokens += len(record["tokens"]) + letters // IMAGE_LETTERS
        if len(held) >= CHUNK_ROWS or tokens >= CHUNK_TOKENS:
            chunks.append(_Chunk(held).encoded())
            held, tokens = [], 0
    return [*chunks, _Chunk(held).encoded()] if held else chunks


class _Chunk:
    """One chunk while it is being made."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows
        self.lengths = [len(row["tokens"]) for row in rows]
        self.strings: dict[str, int] = {}
        self.columns: list[dict[str, Any]] = []
        self.planes: list[bytes] = []

    def encoded(self) -> dict[str, Any]:
        index: dict[str, Any] = {
            "step": [row["step"] for row in self.rows],
            "id": [str(row.get("id")) for row in self.rows],
            "length": self.lengths,
            "finished": [bool(row.get("finished", True)) for row in self.rows],
            "reward": [number(row.get("reward")) for row in self.rows],
            "task": [str(row["task"]) if "task" in row else None for row in self.rows],
            "image": ["image" in row for row in self.rows],
            # A picture, an episode and a drafter's blocks are no answers that a teacher would give itself.
            "taught": [None if row.keys() & OTHERS else "teacher_answer" in row for row in self.rows],
            "read": ["teacher_prompt" in row for row in self.rows],
            "means": {},
        }
        self._texts("tokens", [str(token) for row in self.rows for token in row["tokens"]])
        ranges, of_rows = {}, []
        for name in dict.fromkeys(name for row in self.rows for name in _values(row)):
            column = [v for row, n in zip(self.rows, self.lengths, strict=True) for v in _per_token(row, name, n)]
            self._numbers(f"values.{name}", column)
            index["means"][name] = self._means(column)
            ranges[name] = _range(column)
            if self._of_rows(column):
                of_rows.append(name)
        extras: list[dict[str, Any]] = [
            {key: value for key, value in row.items() if key not in PLAIN} for row in self.rows
        ]
        for key in dict.fromkeys(key for extra in extras for key in extra):
            pairs = zip(extras, self.lengths, strict=True)
            if all(_is_ranked(extra.get(key), length) for extra, length in pairs):
                self._ranked(key, [extra.pop(key) for extra in extras])
        prompts: dict[str, int] = {}
        header = {
            "prompt": [prompts.setdefault(_json(row.get("prompt")), len(prompts)) for row in self.rows],
            "text": [_text(row) for row in self.rows],
            "teacher_answer": [str(row["teacher_answer"]) if "teacher_answer" in row else None for row in self.rows],
            "teacher_prompt": [
                prompts.setdefault(_json(row["teacher_prompt"]), len(prompts)) if "teacher_prompt" in row else None
                for row in self.rows
            ],
            "extra": [finite(extra) for extra in extras],
            "columns": self.columns,
            "prompts": [json.loads(text) for text in prompts],
            "strings": list(self.strings),
        }
        start = _json(header).encode()
        payload = struct.pack("<I", len(start)) + start + b"".join(self.planes)
        # mtime=0: the same rows give the same file.
        data = base64.b64encode(gzip.compress(payload, 6, mtime=0)).decode()
        return {"index": index, "ranges": ranges, "of_rows": of_rows, "data": data}

    def _column(self, key: str, integers: Sequence[int], scale: float = 1.0) -> None:
        packed = array("i", integers)
        if sys.byteorder == "big":
            packed.byteswap()
        raw = packed.tobytes()
        self.columns.append({"key": key, "count": len(integers), "scale": scale})
        self.planes.append(b"".join(raw[plane::4] for plane in range(4)))

    def _texts(self, key: str, texts: Iterable[str]) -> None:
        self._column(key, [self.strings.setdefault(text, len(self.strings)) for text in texts])

    def _numbers(self, key: str, values: Sequence[float | None]) -> None:
        scale = _scale([v for v in values if v is not None])
        self._column(key, [MISSING if v is None else round(v * scale) for v in values], scale)

    def _ranked(self, key: str, values: Sequence[dict[str, Any]]) -> None:
        """`{side: for each token [[text, number], ...]}` as three columns a side."""
        for side in dict.fromkeys(side for value in values for side in value):
            tokens = [
                pairs for value, n in zip(values, self.lengths, strict=True) for pairs in value.get(side, [[]] * n)
            ]
            self._column(f"{key}/{side}/count", [len(pairs) for pairs in tokens])
            self._texts(f"{key}/{side}/text", (text for pairs in tokens for text, _ in pairs))
            self._numbers(f"{key}/{side}/number", [number(value) for pairs in tokens for _, value in pairs])

    def _of_rows(self, column: Sequence[float | None]) -> bool:
        """Whether each row has one value, the same at all its tokens."""
        ends = list(itertools.accumulate(self.lengths))
        return all(len(set(column[start:end])) < 2 for start, end in zip([0, *ends], ends, strict=False))

    def _means(self, column: Sequence[float | None]) -> list[float | None]:
        means = []
        ends = list(itertools.accumulate(self.lengths))
        for start, end in zip([0, *ends], ends, strict=False):
            known = [v for v in column[start:end] if v is not None]
            means.append(number(sum(known) / len(known)) if known else None)
        return means


def finite(value: object) -> object:
    """The same data with None where a number is not finite: JSON in a browser has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _values(row: dict[str, Any]) -> dict[str, Any]:
    values = row.get("values")
    return values if isinstance(values, dict) else {}


def _per_token(row: dict[str, Any], name: str, length: int) -> list[float | None]:
    values = _values(row).get(name)
    if not isinstance(values, list) or len(values) != length:
        return [None] * length
    return [number(value) for value in values]


def _is_ranked(value: Any, length: int) -> bool:
    return isinstance(value, dict) and all(
        isinstance(tokens, list)
        and len(tokens) == length
        and all(
            isinstance(pairs, list)
            and all(
                isinstance(pair, list)
                and len(pair) == 2
                and isinstance(pair[0], str)
                and isinstance(pair[1], int | float)
                for pair in pairs
            )
            for pairs in tokens
        )
        for tokens in value.values()
    )


def _text(row: dict[str, Any]) -> str | int | None:
    """The completion's text: the number of last tokens that are not in it (ends of a turn) where it is what the others
    read as one by one; itself where it is not (a character cut into bytes, blanks that a tokenizer keeps for itself);
    None where the row says nothing of it."""
    if not isinstance(row.get("completion"), str):
        return None
    tokens = [str(token) for token in row["tokens"]]
    for left_out in range(min(LAST, len(tokens)) + 1):
        if "".join(tokens[: len(tokens) - left_out]) == row["completion"]:
            return left_out
    return row["completion"]


def _scale(values: Sequence[float]) -> float:
    """Ten thousand for the four decimals that runs write; otherwise what keeps eight digits of the largest value."""
    top = max((abs(v) for v in values), default=0.0)
    if top < 1e5 and all(abs(v * 1e4 - round(v * 1e4)) < 1e-6 for v in values):
        return 1e4
    return 10.0 ** (8 - math.ceil(math.log10(top)))


def _range(column: Sequence[float | None]) -> list[float]:
    """Lowest, 2 %, 98 % and highest value; the page's colour scales span the middle two."""
    known = sorted(v for v in column if v is not None)
    if not known:
        return [0.0, 0.0, 0.0, 0.0]
    last = len(known) - 1
    return [known[0], known[round(0.02 * last)], known[round(0.98 * last)], known[-1]]


def _json(data: Any) -> str:
    return json.dumps(finite(data), separators=(",", ":"), allow_nan=False)
