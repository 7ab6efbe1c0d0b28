"""Models and drawings that the tests of flow share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from opd.flow.creation import create_flow_model
from opd.language.creation import symbol_tokenizer
from tests.flow.tiny import PIXELS, PROMPTS, WORDS


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """Rows with the path of an 8 x 8 drawing: a colour, or the colour under a dark bar."""
    folder, rows = tmp_path_factory.mktemp("drawings"), []
    for text in PROMPTS:
        colour, shape = text.split()
        picture = np.full((8, 8, 3), PIXELS[colour], np.uint8)
        if shape == "circle":
            picture[:2] = 20
        Image.fromarray(picture).save(folder / f"{text}.png")
        rows.append({"id": text, "prompt": text, "task": shape, "image": str(folder / f"{text}.png")})
    return rows


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of two tiny models that read the same words."""
    folder = tmp_path_factory.mktemp("flow")
    tokenizer = symbol_tokenizer(WORDS, words=True)
    options = {"size": 8, "layers": 1, "heads": 2, "head_width": 8, "prompt_width": 16, "places": 4, "shift": 3.0}
    return [
        str(create_flow_model(folder / name, tokenizer, seed=seed, **options))
        for seed, name in enumerate(("student", "teacher"))
    ]
