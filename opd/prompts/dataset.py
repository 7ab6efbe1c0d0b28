"""Prompts from a `datasets` dataset: a hub name, a folder of files, or one saved by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from opd.errors import DataError, first_line
from opd.prompts.base import Numbered, Prompts

if TYPE_CHECKING:
    from datasets import Dataset


class DatasetPrompts(Prompts):
    """Rows of one split of a dataset. Images stay encoded: a column of them holds `{bytes, path}`, one of lists lists
    of these."""

    kind: Literal["dataset"] = "dataset"
    path: str = Field(description="Name on the hub, or a folder, as datasets.load_dataset takes it")
    name: str | None = Field(None, description="Of the dataset's configuration")
    split: str = Field("train", description="Of the dataset")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub")

    @property
    def remote(self) -> str | None:
        return None if Path(self.path).exists() else self.path

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        import datasets

        quiet = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            if (Path(self.path) / "dataset_info.json").exists() or (Path(self.path) / "dataset_dict.json").exists():
                data = datasets.load_from_disk(self.path)
                if isinstance(data, datasets.DatasetDict):
                    data = data[self.split]
            else:
                data = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except KeyError:
            raise DataError(f"prompts.split: {self.path!r} has no split {self.split!r}") from None
        except Exception as error:
            raise DataError(f"prompts.path: cannot load the dataset {self.path!r} ({first_line(error)})") from None
        finally:
            if not quiet:
                datasets.enable_progress_bars()
        rows = enumerate(encoded_images(data))
        return [(f"{self.path}[{i}]", {"id": Numbered(f"{self.split}-{i}"), **row}) for i, row in rows]


def encoded_images(data: Dataset) -> Dataset:
    """A `datasets` dataset whose images stay encoded, `{bytes, path}`: all rows are held in memory."""
    import datasets

    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            # A list, whatever this version of datasets calls one.
            data = data.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return data
