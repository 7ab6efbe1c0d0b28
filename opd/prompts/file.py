"""Prompts from a local file: JSON lines, plain text (one prompt a line), CSV or Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from opd.errors import DataError
from opd.prompts.base import Prompts


class FilePrompts(Prompts):
    """`.jsonl`, `.txt`, `.csv` and `.parquet`, read as UTF-8; errors name the line."""

    kind: Literal["file"] = "file"
    path: str = Field(description="Of a .jsonl, .txt, .csv or .parquet file")

    @field_validator("path")
    @classmethod
    def _beside_the_recipe(cls, value: str, info: ValidationInfo) -> str:
        """A relative path is looked for in the working directory, then beside the recipe."""
        folder = (info.context or {}).get("folder")
        if folder is not None and not Path(value).exists() and (folder / value).exists():
            return str(folder / value)
        return value

    @property
    def folder(self) -> Path:
        return Path(self.path).expanduser().parent

    def rows(self) -> Sequence[tuple[str, dict[str, Any] | DataError]]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise DataError(f"prompts.path: no file {self.path!r}; give a .jsonl, .txt, .csv or .parquet file")
        if path.suffix in (".jsonl", ".txt"):
            return self._lines(path)
        if path.suffix in (".csv", ".parquet"):
            return self._table(path)
        raise DataError(
            f"prompts.path: {self.path!r} ends with {path.suffix!r}; accepted are .jsonl, .txt, .csv and .parquet"
        )

    def _lines(self, path: Path) -> list[tuple[str, dict[str, Any] | DataError]]:
        rows: list[tuple[str, dict[str, Any] | DataError]] = []
        for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8").strip("\r")
            except UnicodeDecodeError as error:
                problem = f"{where}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
                rows.append((where, DataError(problem)))
                continue
            if not line.strip():
                continue
            if path.suffix == ".txt":
                rows.append((where, {"id": f"{path.stem}-{number}", self.column: line}))
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line"
                rows.append((where, DataError(problem)))
                continue
            if isinstance(fields, dict):
                rows.append((where, {"id": f"{path.stem}-{number}", **fields}))
            else:
                problem = f"{where}: holds a {type(fields).__name__}; each line must be one JSON object"
                rows.append((where, DataError(problem)))
        return rows

    def _table(self, path: Path) -> list[tuple[str, dict[str, Any] | DataError]]:
        import pandas

        try:
            table = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
        except (UnicodeDecodeError, ValueError, OSError, pandas.errors.ParserError) as error:
            raise DataError(f"{path}: cannot be read as {path.suffix[1:]} ({str(error).splitlines()[0]})") from None
        records = table.astype(object).where(table.notna(), "").to_dict("records")
        return [
            (f"{path}:{i + 1}", {"id": f"{path.stem}-{i + 1}", **{str(k): v for k, v in row.items()}})
            for i, row in enumerate(records)
        ]
