"""A drafter that is written in another format than its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opd.drafting.formats import Format, Made, difference, write
from opd.files.whole import attempt


@dataclass(frozen=True)
class Exported:
    """Writes a drafter in a format, and knows whether what lies in a folder is that drafter."""

    format: Format
    made: Made

    @property
    def library(self) -> str:
        return self.format.library

    def save(self, folder: Path, card: str) -> list[str]:
        """Config, weights, and a model card.

        Raises:
            ModelError: the format has no place for drafters of this form.
            OSError, SafetensorError: the weights cannot be written.
        """
        config = self.format.config(self.made)
        write(folder, self.format.weights(self.made), config)
        return attempt("the model card", lambda: (folder / "README.md").write_text(card, encoding="utf-8"))

    def compare(self, folder: Path) -> str | None:
        """How the tensors in `folder` differ from those of the live drafter; None where every one is the same."""
        return difference(folder, self.format.weights(self.made))
