"""What the step benchmark of image-text models runs on: small models of two families, pictures, questions.

All prompts have the same number of tokens and all completions too, so that no side computes padding; what is measured
is what a step costs besides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedModel,
    ProcessorMixin,
)

from benchmarks.sizes import MODELS, SEED, Shape, Size
from opd.language.creation import symbol_tokenizer
from opd.policies.image_text import ImageText
from opd.vision.creation import create_image_text_model
from opd.vision.processor import load_processor

TEXT = Shape(192, 4, 4)
VISION_WIDTH, VISION_LAYERS = 128, 2
PIXELS, PATCH, MERGE = 96, 8, 2
"""Pictures come to 36 tokens in both families."""
PLACES = {"qwen2_5_vl": 4, "idefics3": 3}
"""The last ids of each family's vocabulary stand for pictures, and are in no distribution."""
POOL = 64
"""Pictures of a column; no two prompts of a step share one."""
COLUMNS = ("image", "other")
IDEFICS = ("<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>")
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %} {{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Pictured(Size):
    """One problem whose prompts have a picture; both models have the shape `TEXT`, and `vocabulary` counts words.

    Attributes:
        family: of both models.
        sees: the column with the teacher's picture.
    """

    family: str = "qwen2_5_vl"
    sees: str = "other"

    @property
    def folder(self) -> Path:
        return MODELS / f"{self.family}-{self.vocabulary}"

    @property
    def rows(self) -> Path:
        """The prompts of a step benchmark's steps, as `opd` reads them."""
        return self.folder / f"rows-{self.batch}-{self.prompt[1]}.jsonl"

    def picture(self, column: str, number: int) -> Path:
        return self.folder / "pictures" / f"{column}-{number % POOL}.png"

    def read(self, processor: Any, texts: Sequence[str], pictures: Sequence[Path]) -> dict[str, torch.Tensor]:
        """What a model takes of questions of one length, each under its picture."""
        asked = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for text in texts
        ]
        opened = [[Image.open(path).convert("RGB")] for path in pictures]
        made = dict(processor(text=asked, images=opened, add_special_tokens=False, return_tensors="pt"))
        del made["attention_mask"]
        return made

    def processor(self) -> ProcessorMixin:
        return load_processor(ImageText(model=str(self.folder / "student")))

    def encoded(self, steps: int) -> list[list[int]]:
        texts, processor = self.prompts(steps), self.processor()
        # Of pictures of one size nothing shows in the ids.
        given = self.read(processor, texts, [self.picture("image", 0)] * len(texts))
        ids: list[list[int]] = given["input_ids"].tolist()
        return ids

    def load(self, name: str) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(self.folder / name, dtype=torch.float32)
        return model.eval()


def materialise(size: Pictured, steps: int) -> None:
    """Write what is not there yet: models, pictures, rows."""
    words = [f"w{i}" for i in range(size.vocabulary)]
    for seed, name in ((SEED, "student"), (SEED + 1, "teacher")):
        folder = size.folder / name
        if not (folder / "model.safetensors").exists():
            {"qwen2_5_vl": _qwen, "idefics3": _idefics}[size.family](folder, words, seed)
    for place, column in enumerate(COLUMNS):
        for number in range(POOL):
            path = size.picture(column, number)
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                noise = np.random.default_rng([SEED, place, number])
                Image.fromarray(noise.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)).save(path)
    rows = [
        {"prompt": text, **{column: str(size.picture(column, i)) for column in COLUMNS}}
        for i, text in enumerate(size.prompts(steps))
    ]
    size.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _qwen(folder: Path, words: Sequence[str], seed: int) -> None:
    shape = {"width": TEXT.width, "layers": TEXT.layers, "heads": TEXT.heads, "pixels": PIXELS}
    create_image_text_model(
        folder, words, vision_width=VISION_WIDTH, vision_layers=VISION_LAYERS, seed=seed, overwrite=True, **shape
    )


def _idefics(folder: Path, words: Sequence[str], seed: int) -> None:
    tokenizer = symbol_tokenizer(words, words=True)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in IDEFICS], special_tokens=True)
    edge = {"longest_edge": PIXELS}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    tokens = (PIXELS // PATCH // MERGE) ** 2
    processor = Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=TEMPLATE)
    sides = {"num_attention_heads": TEXT.heads, "initializer_range": 0.06}
    config = AutoConfig.for_model(
        "idefics3",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=MERGE,
        vision_config={
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 3 * VISION_WIDTH,
            "num_hidden_layers": VISION_LAYERS,
            "image_size": PIXELS,
            "patch_size": PATCH,
            **sides,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT.width,
            "intermediate_size": 3 * TEXT.width,
            "num_hidden_layers": TEXT.layers,
            "num_key_value_heads": TEXT.heads,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **sides,
        },
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(str(folder))
