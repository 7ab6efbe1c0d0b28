"""New flow models: a small transformer on pixels with a prompt table, for experiments from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from opd.drawings.vocabulary import drawing_tokenizer
from opd.errors import ModelError
from opd.files.ours import refuse_taken
from opd.files.whole import whole_folder
from opd.flow.encoder import PromptTable
from opd.flow.model import FlowModel, import_diffusers
from opd.language.model import ModelSettings, load_tokenizer
from opd.provenance import write_origin


def named_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """`drawings`, `drawings:count,glyph`, or anything that has a tokenizer already."""
    if reference == "drawings" or reference.startswith("drawings:"):
        return drawing_tokenizer(*filter(None, reference.removeprefix("drawings").removeprefix(":").split(",")))
    return load_tokenizer(ModelSettings(model=reference, template="plain"))


def create_flow_model(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: int = 32,
    patch: int = 4,
    layers: int = 3,
    heads: int = 3,
    head_width: int = 24,
    prompt_width: int = 64,
    places: int = 8,
    shift: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a randomly initialised `SD3Transformer2DModel` that draws RGB images of `size` pixels, its scheduler and
    its prompt table; diffusers loads the first two from `transformer/` and `scheduler/`.

    Args:
        folder: where to; refused when it holds anything, unless `overwrite` and that is a model that `opd` wrote.
        tokenizer: of the prompts; it needs a padding token.
        patch: pixels on the side of one of the transformer's patches.
        places: L, tokens of the longest prompt.
        shift: of the scheduler's times towards noise.
        seed: of the weights; the global generator is left as it was.

    Raises:
        ModelError: sizes that fit no model, or a folder that is taken or cannot be written.
    """
    folder = Path(folder)
    diffusers = import_diffusers()
    numbers = {
        "size": size,
        "patch": patch,
        "layers": layers,
        "heads": heads,
        "head_width": head_width,
        "prompt_width": prompt_width,
        "places": places,
    }
    for name, value in numbers.items():
        if value < 1:
            raise ModelError(f"{name} is {value}; give 1 or more")
    if (heads * head_width) % 4:
        raise ModelError(
            f"heads x head_width is {heads * head_width}; places are written in quarters of it: give a multiple of 4"
        )
    if size % patch:
        raise ModelError(f"size is {size} with patches of {patch}; give a multiple of {patch}")
    if tokenizer.pad_token_id is None:
        raise ModelError("the tokenizer has no padding token; prompts of a table are padded to one length")
    if folder.is_file():
        raise ModelError(f"{folder} is a file; give a folder")
    if (folder / "transformer").exists() and not overwrite:
        raise ModelError(f"{folder} holds a model already; choose another folder, or pass overwrite")
    refuse_taken(folder, overwrite)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=size,
            patch_size=patch,
            in_channels=3,
            out_channels=3,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_width,
            caption_projection_dim=heads * head_width,
            joint_attention_dim=prompt_width,
            pooled_projection_dim=prompt_width,
            pos_embed_max_size=size // patch,
        )
        table = PromptTable(tokenizer, prompt_width, prompt_width, places)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    try:
        with whole_folder(folder) as partial:
            FlowModel(transformer, scheduler, table).save(partial)
            write_origin(partial, teachers=[])
    except OSError as error:
        raise ModelError(f"cannot write a model to {folder} ({error.strerror})") from None
    return folder
