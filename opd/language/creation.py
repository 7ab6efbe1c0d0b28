"""New models and tokenizers: small alphabets, and randomly initialised model folders, for experiments from scratch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from opd.choice import choices_of
from opd.errors import ModelError, nearest
from opd.files.ours import refuse_taken
from opd.files.whole import whole_folder
from opd.language.model import ModelSettings, load_tokenizer
from opd.procedural.base import Task, symbols_of
from opd.provenance import write_origin

SPECIAL = ("<pad>", "<eos>", "<unk>")
"""Ids 0, 1 and 2 of every tokenizer made here."""

Family = Literal["llama", "qwen3"]


def symbol_tokenizer(symbols: Sequence[str], *, words: bool = False, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """A tokenizer with one id a symbol, in the order given, after `SPECIAL`.

    Args:
        symbols: characters, or with `words` the words that stand between blanks; anything else becomes `<unk>`.
        pad: `"<eos>"` makes the end token the padding token too.

    Nothing is added to a text, and there is no chat template: recipes say `template: plain`.

    Raises:
        ModelError: symbols that are doubled, empty, or cannot be told apart from others.
    """
    often = Counter((*symbols, *SPECIAL))
    for symbol in symbols:
        if often[symbol] > 1:
            raise ModelError(f"symbol {symbol!r} stands twice in the tokenizer; each symbol needs an id of its own")
        if (symbol.split() != [symbol]) if words else (len(symbol) != 1):
            raise ModelError(f"symbol {symbol!r} is not one {'word' if words else 'character'}")
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate((*SPECIAL, *symbols))}, unk_token="<unk>"))
    if words:
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )


def task_tokenizer(*kinds: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one or several procedural tasks together; ids depend on the set of tasks only."""
    tasks: Any = choices_of(Task)
    for kind in kinds:
        if kind not in tasks:
            raise ModelError(f"no procedural task {kind!r}{nearest(kind, tasks)}; there are {', '.join(tasks)}")
    symbols, words = symbols_of([tasks[kind] for kind in kinds])
    return symbol_tokenizer(symbols, words=words)


def named_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """`task:running_sum`, `task:arithmetic,list_program`, or anything that has a tokenizer already."""
    if reference.startswith("task:"):
        return task_tokenizer(*reference.removeprefix("task:").split(","))
    return load_tokenizer(ModelSettings(model=reference, template="plain"))


def create_model(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: Family = "llama",
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    feed_forward: int | None = None,
    positions: int = 512,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a randomly initialised causal language model and its tokenizer; `from_pretrained` reads the folder.

    Args:
        folder: where to; refused when it holds anything, unless `overwrite` and that is a model that `opd` wrote.
        tokenizer: the vocabulary is its length.
        width: D, a multiple of twice `heads` (rotary positions turn pairs of numbers).
        feed_forward: inner width; default 4 D.
        positions: longest prompt and completion together.
        seed: of the weights, which are float32 and depend on nothing else; the global generator is left as it was.

    Raises:
        ModelError: sizes that fit no model, or a folder that is taken.
    """
    folder = Path(folder)
    if family not in get_args(Family):
        raise ModelError(f"family is {family!r}{nearest(family, get_args(Family))}; accepted: llama, qwen3")
    sizes = {"width": width, "layers": layers, "heads": heads, "feed_forward": feed_forward, "positions": positions}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ModelError(f"{name} is {value}; give 1 or more")
    if width % (2 * heads):
        raise ModelError(f"width is {width} with {heads} heads; give a multiple of {2 * heads}")
    if folder.is_file():
        raise ModelError(f"{folder} is a file; give a folder")
    if (folder / "config.json").exists() and not overwrite:
        raise ModelError(f"{folder} holds a model already; choose another folder, or pass overwrite")
    refuse_taken(folder, overwrite)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=feed_forward or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        with whole_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_origin(partial, teachers=[])
    except OSError as error:
        raise ModelError(f"cannot write a model to {folder} ({error.strerror})") from None
    return folder
