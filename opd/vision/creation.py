"""New image-text models: small, randomly initialised, with a processor, for experiments from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
)

from opd.errors import ModelError
from opd.files.ours import refuse_taken
from opd.files.whole import whole_folder
from opd.language.creation import symbol_tokenizer
from opd.provenance import write_origin
from opd.vision.processor import picture_reader, tokenizer_of
from opd.vision.videos import middles

PLACES = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %} {{ message.content }} {% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part.text }} {% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
PATCH, MERGE = 8, 2
TEMPLATE_OF_CLIPS = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
STEP = 2
"""Frames that one patch of a clip spans."""
THETA = 100.0
"""Of the rotary positions: pictures are a few tokens wide, and at usual values places in them look alike."""


def create_image_text_model(
    folder: str | Path,
    symbols: Sequence[str],
    *,
    width: int = 96,
    layers: int = 2,
    heads: int = 4,
    vision_width: int = 64,
    vision_layers: int = 1,
    pixels: int = 96,
    spread: float = 0.06,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a small Qwen2.5-VL with patches of 8 pixels and one token a word, and its processor.

    Args:
        folder: where to; refused when it holds anything, unless `overwrite` and that is a model that `opd` wrote.
        symbols: the words of prompts and answers.
        width: D of the text's layers, a multiple of twice `heads`.
        vision_width: of what reads pictures, a multiple of four times `heads`.
        pixels: side of the largest picture; larger ones are made smaller.
        spread: standard deviation of the initial weights.
        seed: of the weights, which are float32 and depend on nothing else.

    Raises:
        ModelError: sizes that fit no model, or a folder that is taken.
    """
    folder = Path(folder)
    _check(folder, overwrite, heads, layers, vision_layers, {"width": (width, 2), "vision_width": (vision_width, 4)})
    if pixels < 2 * PATCH * MERGE:
        raise ModelError(f"pixels is {pixels}; give {2 * PATCH * MERGE} or more")
    tokenizer = symbol_tokenizer(symbols, words=True)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in PLACES], special_tokens=True)
    start, image, end, video = (tokenizer.get_vocab()[token] for token in PLACES)
    size = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": pixels**2}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1, size=size)
    processor = picture_reader(Qwen2_5_VLProcessor, images, tokenizer, TEMPLATE)
    axial = {"rope_type": "axial", "rope_theta": THETA}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=_text(tokenizer, width, layers, heads, spread, {"mrope_section": [1] * (width // heads // 2)}),
        vision_config={
            **_vision(vision_width, vision_layers, heads, spread, 1, width),
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": list(range(vision_layers)),
            "rope_parameters": axial,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        initializer_range=spread,
        tie_word_embeddings=False,
    )
    return _write(folder, config, processor, seed)


def create_clip_model(
    folder: str | Path,
    characters: Sequence[str],
    words: Sequence[str],
    times: Sequence[float],
    pixels: int,
    *,
    width: int = 96,
    layers: int = 2,
    heads: int = 4,
    vision_width: int = 64,
    vision_layers: int = 2,
    spread: float = 0.06,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a small Qwen3-VL for clips: a token a character, a word or a time stamp, patches of 8 pixels and steps of
    two frames. Further arguments, and errors, are those of `create_image_text_model`; `width` is a multiple of six
    times `heads`.

    Args:
        characters: of prompts and answers.
        words: that are one token each.
        times: seconds of a clip's frames, whose stamps are one token each.
        pixels: side of the largest clip, a multiple of 8.
    """
    folder = Path(folder)
    _check(folder, overwrite, heads, layers, vision_layers, {"width": (width, 6), "vision_width": (vision_width, 4)})
    tokenizer = symbol_tokenizer(characters)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    stamps = [f"<{time:.1f} seconds>" for time in middles(times, STEP)]
    tokenizer.add_tokens([AddedToken(stamp, normalized=False) for stamp in stamps])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in PLACES], special_tokens=True)
    start, image, end, video = (tokenizer.get_vocab()[token] for token in PLACES)
    size = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": pixels**2}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=STEP, size=size)
    processor = picture_reader(Qwen3VLProcessor, images, tokenizer, TEMPLATE_OF_CLIPS)
    rope = {"mrope_section": [width // heads // 6] * 3, "mrope_interleaved": True}
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config={**_text(tokenizer, width, layers, heads, spread, rope), "head_dim": width // heads},
        vision_config={
            **_vision(vision_width, vision_layers, heads, spread, STEP, width),
            "num_position_embeddings": (pixels // PATCH) ** 2,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        initializer_range=spread,
        tie_word_embeddings=False,
    )
    return _write(folder, config, processor, seed)


def _text(
    tokenizer: PreTrainedTokenizerBase, width: int, layers: int, heads: int, spread: float, rope: dict[str, Any]
) -> dict[str, Any]:
    """Settings of the layers that read and write; `rope` are those of the family's positions."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 512,
        "initializer_range": spread,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, **rope},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision(width: int, layers: int, heads: int, spread: float, frames: int, out: int) -> dict[str, Any]:
    """Settings of the layers that look; a patch spans `frames`, and `out` is the width of the text's layers."""
    return {
        "depth": layers,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_heads": heads,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": frames,
        "out_hidden_size": out,
        "initializer_range": spread,
    }


def _check(
    folder: Path, overwrite: bool, heads: int, layers: int, vision_layers: int, widths: dict[str, tuple[int, int]]
) -> None:
    """Raise `ModelError` for sizes that fit no model, or a folder that is taken; `widths` by name with the number of
    times `heads` that they must be a multiple of."""
    for name, (value, times) in widths.items():
        factor = times * heads
        if value < 1 or value % factor:
            raise ModelError(f"{name} is {value} with {heads} heads; give a multiple of {factor}")
    for name, value in (("layers", layers), ("vision_layers", vision_layers)):
        if value < 1:
            raise ModelError(f"{name} is {value}; give 1 or more")
    if folder.is_file():
        raise ModelError(f"{folder} is a file; give a folder")
    if (folder / "config.json").exists() and not overwrite:
        raise ModelError(f"{folder} holds a model already; choose another folder, or pass overwrite")
    refuse_taken(folder, overwrite)


def _write(folder: Path, config: PretrainedConfig, processor: ProcessorMixin, seed: int) -> Path:
    """A model of random weights in float32, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer_of(processor).eos_token_id
    try:
        with whole_folder(folder) as partial:
            model.save_pretrained(partial)
            processor.save_pretrained(str(partial))
            write_origin(partial, teachers=[])
    except OSError as error:
        raise ModelError(f"cannot write a model to {folder} ({error.strerror})") from None
    return folder
