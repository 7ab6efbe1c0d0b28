"""The closed vocabulary of the drawing tasks as a tokenizer, for prompt encoders trained from scratch."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.choice import choices_of
from opd.drawings.base import Drawing
from opd.errors import ModelError, nearest
from opd.language.creation import symbol_tokenizer


def drawing_tokenizer(*kinds: str) -> PreTrainedTokenizerFast:
    """One id for each word of small letters, and for each other character: `text 4K7` has four.

    Ids depend on the set of tasks only, all tasks without `kinds`. After `<pad>` 0, `<eos>` 1 and `<unk>` 2 stand the
    symbols in alphabetical order. Nothing is added to a text; `model_max_length` is that of the longest prompt, and
    padding stands on the right. The empty prompt of classifier-free guidance is padding alone.

    Raises:
        ModelError: no such task.
    """
    tasks: Any = choices_of(Drawing)
    for kind in kinds:
        if kind not in tasks:
            raise ModelError(f"no drawing task {kind!r}{nearest(kind, tasks)}; there are {', '.join(tasks)}")
    chosen = [tasks[kind] for kind in kinds or tasks]
    tokenizer = symbol_tokenizer(sorted({symbol for task in chosen for symbol in task.symbols}), words=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[^a-z\s]"), "removed", invert=True)
    tokenizer.model_max_length = max(task.longest for task in chosen)
    tokenizer.padding_side = "right"
    return tokenizer
