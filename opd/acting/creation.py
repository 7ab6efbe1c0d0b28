"""New policies over action tokens: randomly initialised, made for an environment's body and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from opd.acting.layout import CONFIG, Layout
from opd.acting.model import ActionModel
from opd.acting.seeing import Body, Numbers, Statistics
from opd.errors import ModelError
from opd.files.ours import refuse_taken
from opd.files.whole import whole_folder
from opd.language.creation import symbol_tokenizer
from opd.provenance import write_origin

READS = ("image", "proprio", "state")


def create_policy(
    folder: str | Path,
    body: Body,
    instructions: Sequence[str],
    *,
    key: str = "environment",
    reads: Sequence[str] = ("image", "proprio"),
    chunk: int = 4,
    bins: int = 64,
    patch: int = 8,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    queries: bool = True,
    seen: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a randomly initialised policy, its tokenizer of the instructions' words, and its statistics: of actions the
    body's own bounds.

    Args:
        folder: where to; refused when it holds anything, unless `overwrite` and that is a model that `opd` wrote.
        key: of the statistics.
        reads: which of `image`, `proprio` and `state` it reads; one that reads the state is a privileged teacher.
        chunk: H, actions of a decision.
        bins: K of each dimension.
        patch: pixels on the side of a patch.
        width: D, a multiple of twice `heads`.
        queries: learnt placeholders, see `Layout`; False is OpenVLA-OFT's sequence to the letter.
        seen: of `proprio` and `state` what it reads as -1 and 1 (`ranges` of demonstrations); by default as they are,
            which is slow to learn from where they vary by little.
        seed: of the weights; the global generator is left as it was.

    Raises:
        ModelError: sizes that fit no model, or a folder that is taken or cannot be written.
    """
    folder = Path(folder)
    sizes = {"chunk": chunk, "patch": patch, "width": width, "layers": layers, "heads": heads}
    for name, value in sizes.items():
        if value < 1:
            raise ModelError(f"{name} is {value}; give 1 or more")
    if bins < 2:
        raise ModelError(f"bins is {bins}; give 2 or more")
    if width % (2 * heads):
        raise ModelError(f"width is {width} with {heads} heads; give a multiple of {2 * heads}")
    if folder.is_file():
        raise ModelError(f"{folder} is a file; give a folder")
    wrong = next((name for name in reads if name not in READS), None)
    if wrong is not None or not reads:
        raise ModelError(f"reads names {wrong!r}; give one or more of {', '.join(READS)}")
    if "image" in reads and not body.cameras:
        raise ModelError("the environment has no picture to read; set its pixels, or leave image out of what is read")
    if (folder / CONFIG).exists() and not overwrite:
        raise ModelError(f"{folder} holds a model already; choose another folder, or pass overwrite")
    refuse_taken(folder, overwrite)
    words = sorted({word for text in instructions for word in text.split()})
    tokenizer = symbol_tokenizer(words, words=True)
    # Behind the words stands the mark of the beginning, and behind it the actions.
    begin = len(tokenizer)
    count = begin + 1 + bins
    layout = Layout(
        width=width,
        layers=layers,
        heads=heads,
        feed_forward=4 * width,
        vocabulary=count,
        words=count,
        chunk=chunk,
        dimensions=body.dimensions,
        bins=bins,
        cameras=body.cameras if "image" in reads else 0,
        pixels=body.pixels if "image" in reads else 0,
        patch=patch,
        proprio=body.proprio if "proprio" in reads else 0,
        state=body.state if "state" in reads else 0,
        begin=begin,
        queries=queries,
        stop=int(tokenizer.eos_token_id),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ActionModel(layout, tokenizer, replace(Statistics.of(body, key), seen=dict(seen or {})))
    try:
        with whole_folder(folder) as partial:
            model.save(partial)
            write_origin(partial, teachers=[])
    except OSError as error:
        raise ModelError(f"cannot write a model to {folder} ({error.strerror})") from None
    return folder
