"""What a model reads with: hashes of tokenizer and template that do not depend on files or machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

PROBE = "Zoë paid 3.50 for 12 apples;\n  then left.\t<b>ok</b>"
"""Two tokenizers of one vocabulary are the same when they split this alike."""


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """`sha256:...` over every token's id and how a probe text is split."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return _of_json([vocabulary, tokenizer(PROBE)["input_ids"]])


def template_hash(tokenizer: PreTrainedTokenizerBase, template: str, options: Mapping[str, object]) -> str:
    """`sha256:...` over how a prompt becomes ids: the kind of template, its options and its text."""
    text = tokenizer.chat_template if template == "chat" else None
    return _of_json([template, dict(options), text])


def _of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
