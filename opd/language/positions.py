"""How many positions a model has, and whether a run's prompts and completions fit."""

from __future__ import annotations

from typing import Any

import torch

from opd.errors import ModelError
from opd.language.engines.in_process import InProcess
from opd.language.layers import decoder_of

NAMES = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed", "pos_encoding")
"""What families call the table of their positions; other models turn or bias by distance."""


def table_size(body: torch.nn.Module) -> int | None:
    """Positions of the table that a decoder looks its positions up in; None where it has none."""
    sizes = []
    for name, part in body.named_modules():
        if name.rpartition(".")[2] in NAMES and isinstance(getattr(part, "weight", None), torch.Tensor):
            sizes.append(len(part.weight) - int(getattr(part, "offset", 0)))
    # GPT-J and CodeGen keep their rotations as a table, which ends too.
    sizes += [len(b) for name, b in body.named_buffers() if name.rpartition(".")[2] in NAMES and b.dim() == 2]
    return min(sizes, default=None)


def check_positions(language: InProcess, prompt: int, budget: int, which: str) -> str | None:
    """A warning, or None, for a model that reads prompts of up to `prompt` tokens and completions of up to `budget`.

    Raises:
        ModelError: it has a table of positions, and the table is too short.
    """
    body: Any = decoder_of(language.base)
    # The last token of a completion predicts nothing that is learnt.
    needed = prompt + budget - 1
    numbers = f"the longest prompt has {prompt} tokens and a completion up to {budget}"
    size = table_size(body)
    if size is not None and needed > size:
        room = size + 1 - prompt
        way = f"prompts of more than {size} tokens cannot be read: leave them out (max_prompt_tokens, skip_bad_prompts)"
        if room > 0:
            way = f"let completions have at most {room} tokens (rollout.max_new_tokens, evaluation.max_new_tokens)"
        raise ModelError(f"{which} has {size} positions, and {numbers}; {way}")
    trained = getattr(body.config, "max_position_embeddings", None)
    if size is None and isinstance(trained, int) and needed > trained > 0:
        return (
            f"{which} was made for {trained} positions (max_position_embeddings), and {numbers}: what it says beyond "
            "is guesswork"
        )
    return None
