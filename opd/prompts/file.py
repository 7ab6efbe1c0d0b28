"""Prompts from a local file: JSON lines, plain text (one prompt a line), CSV or Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from opd.errors import DataError, first_line
from opd.prompts.base import FILES, Numbered, Prompts


class FilePrompts(Prompts):
    """`.jsonl`, `.txt`, `.csv` and `.parquet`, read as UTF-8; errors name the line. The cells of a CSV file are texts
    as they stand there (an empty one an empty text), those of Parquet and JSON have their own types."""

    kind: Literal["file"] = "file"
    path: str = Field(description="Of a .jsonl, .txt, .csv or .parquet file")

    @field_validator("path")
    @classmethod
    def _beside_the_recipe(cls, value: str, info: ValidationInfo) -> str:
        """A relative path is looked for in the working directory, then beside the recipe, then where the data lies that
        comes with opd."""
        if Path(value).exists():
            return value
        places = [folder / value for folder in (info.context or {}).get("folders", [])]
        return str(next((place for place in places if place.exists()), value))

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser().parent

    def rows(self) -> Sequence[tuple[str, dict[str, Any] | DataError]]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            looked = "" if path.is_absolute() else f" in {Path.cwd()}, nor beside the recipe or in the data of opd"
            raise DataError(
                f"prompts.path: no file {self.path!r}{looked}; give the whole path of a .jsonl, .txt, .csv or "
                ".parquet file"
            )
        readers = dict(zip(FILES, (_json_lines, self._texts, _csv_rows, _parquet_rows), strict=True))
        if path.suffix not in readers:
            raise DataError(
                f"prompts.path: {self.path!r} ends with {path.suffix!r}; accepted are .jsonl, .txt, .csv and .parquet"
            )
        try:
            found = list(readers[path.suffix](path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        rows: list[tuple[str, dict[str, Any] | DataError]] = []
        for line, number, row in found:
            where = f"{path}:{line}"
            if isinstance(row, ValueError):
                rows.append((where, DataError(f"{where}: {row}")))
            else:
                rows.append((where, {"id": Numbered(f"{path.stem}-{number}"), **row}))
        return rows

    def _texts(self, path: Path) -> Iterator[Row]:
        for number, line in _lines(path):
            yield number, number, line if isinstance(line, ValueError) else {self.column: line}


Row = tuple[int, int, dict[str, Any] | ValueError]
"""Line, the number that the id gets, and the columns or what is wrong with them."""


def _lines(path: Path) -> Iterator[tuple[int, str | ValueError]]:
    """The lines that are not blank, by number from 1."""
    for number, raw in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip("\r")
        except UnicodeDecodeError as error:
            yield number, ValueError(f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8")
            continue
        if line.strip():
            yield number, line


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        yield number, number, line if isinstance(line, ValueError) else _json_object(line)


def _json_object(line: str) -> dict[str, Any] | ValueError:
    try:
        fields = json.loads(
            line, object_pairs_hook=_once_each, parse_constant=_no_number, parse_float=_number, parse_int=_integer
        )
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error.msg}, column {error.colno}); one object a line")
    except RecursionError:
        return ValueError("nested too deeply; make it flatter")
    except ValueError as error:
        return error
    if not isinstance(fields, dict):
        return ValueError(f"holds a {type(fields).__name__}; each line must be one JSON object")
    return fields


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice; keep one")
    return fields


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON; write null or leave the key out")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number; write it as a text")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a number of {len(text)} digits is too long; write it as a text") from None


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows by the lines that they begin in. The first one names the columns."""
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")
    longest = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        names: list[str] | None = None
        number = 0
        while True:
            line = reader.line_num + 1
            try:
                cells: list[str] | ValueError = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells = ValueError(
                    f"not CSV ({error}); put texts with quotes or commas in quotes, and double the quotes"
                )
            if not cells:
                continue
            if isinstance(cells, list) and any(not cell.isascii() and not _whole(cell) for cell in cells):
                cells = ValueError("not UTF-8; save the file as UTF-8")
            if names is None:
                if isinstance(cells, ValueError) or len(set(cells)) < len(cells):
                    problem = cells if isinstance(cells, ValueError) else "two columns have one name; rename one"
                    raise DataError(f"{path}:{line}: cannot be read as csv ({problem})")
                names = cells
                continue
            number += 1
            if isinstance(cells, list) and len(cells) != len(names):
                cells = ValueError(f"has {len(cells)} cells and the file {len(names)} columns; quote texts with commas")
            yield line, number, cells if isinstance(cells, ValueError) else dict(zip(names, cells, strict=True))
    finally:
        csv.field_size_limit(longest)


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Rows with the types of the file: integers stay integers beside empty cells, which are None."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
        records = table.to_pylist()
    except (ArrowException, ValueError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({first_line(error)})") from None
    if len(set(table.column_names)) < len(table.column_names):
        raise DataError(f"{path}: cannot be read as parquet (two columns have one name; rename one)")
    for number, row in enumerate(records, start=1):
        yield number, number, row
