"""What a text recogniser reads in a picture, against the text that the prompt asks for."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from opd.drawings import checked
from opd.prompts import Prompt
from opd.verifiers.base import CompletionVerifier, as_text


class Ocr(CompletionVerifier):
    """1 less the edit distance over the longer text's length, for rows with a column `text`; others have no verdict.

    The whole picture is read as one line, scaled to `height`, by `rapidocr-onnxruntime`, whose models come with the
    package; letters and digits count, in any case. A picture with a value that is not a number has reward 0.
    """

    kind: Literal["ocr"] = "ocr"
    modality: ClassVar[str | None] = "flow"
    reads: ClassVar[str | None] = "text"
    height: int = Field(96, ge=16, le=1024, description="Pixels of height that a picture is scaled to")

    @model_validator(mode="after")
    def _installed(self) -> Ocr:
        if importlib.util.find_spec("rapidocr_onnxruntime") is None:
            raise ValueError("needs the package rapidocr-onnxruntime: pip install 'opd[ocr]'")
        return self

    def score(self, prompt: Prompt, completion: object) -> float | None:
        picture = checked(completion)
        if not self.judges(prompt):
            return None
        if picture is None:
            return 0.0
        wanted, read = _plain(as_text(prompt.fields["text"])), _plain(self.read(picture))
        return 1 - edit_distance(wanted, read) / max(len(wanted), len(read), 1)

    def read(self, picture: np.ndarray) -> str:
        """The text of float32 `[H, W, 3]` in 0..1; empty where there is none."""
        from PIL import Image

        image = Image.fromarray(np.rint(255 * picture).astype(np.uint8))
        width = max(round(picture.shape[1] * self.height / picture.shape[0]), 1)
        # The recogniser takes blue, green, red.
        scaled = np.asarray(image.resize((width, self.height), Image.Resampling.BICUBIC))[..., ::-1]
        found, _ = _recogniser()(scaled, use_det=False, use_cls=False, use_rec=True, text_score=0.0)
        return "".join(str(line[0]) for line in found or ())


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of a character that make `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


@functools.cache
def _recogniser() -> Any:
    from rapidocr_onnxruntime import RapidOCR

    # One thread: training has the others.
    return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
