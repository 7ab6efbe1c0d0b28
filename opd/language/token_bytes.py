"""What each id of a tokenizer adds to a text, in bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from opd.errors import IncompatibleError

RAW = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token that stands for one byte of a character that the vocabulary lacks (byte fallback)."""
PASSED = ("Fuse", "Strip")
"""Steps of a decoder that leave a token's own text as it is; a leading space is looked for where a text is encoded."""
BEHIND = ("\n", ".", "a", "0", "|")
"""What a text is put behind, to encode it as the middle of a text and not as a beginning."""


@dataclass(frozen=True)
class TokenBytes:
    """The texts of a tokenizer's ids.

    Attributes:
        of: UTF-8 bytes of each id that stands for text, often a part of a character's; control tokens are not in it.
        control: ids of control tokens by name.
        unknown: the control token that stands for what the tokenizer does not know; None where there is none.
        raw: the ids of byte fallback, which a tokenizer takes for what it has no other token for.
        core: the tokenizer itself, which reads whatever it is given as text: `<eos>` is five characters.
    """

    of: Mapping[int, bytes]
    control: Mapping[str, int]
    unknown: int | None
    raw: frozenset[int]
    core: Tokenizer

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each sequence of bytes that is one token; of several the one that is no byte fallback, then the
        smallest."""
        order = sorted(self.of, key=lambda i: (i in self.raw, i), reverse=True)
        return {self.of[i]: i for i in order if self.of[i]}

    def bytes(self, ids: Iterable[int]) -> bytes | None:
        """What ids are one after the other; None where a control token is among them."""
        pieces = [self.of.get(i) for i in ids]
        return None if None in pieces else b"".join(piece for piece in pieces if piece is not None)

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text that stands behind another one; None where no ids of this tokenizer are that text, as of
        one that changes letters or knows some not."""
        wanted = text.encode()
        ids = self._ids(text)
        if self.bytes(ids) == wanted:
            return ids
        # Some put a space before whatever they read: that belongs to a beginning, and this is none.
        for before in BEHIND:
            ids = self._ids(before + text)
            pieces = [self.of.get(i) for i in ids]
            if None in pieces:
                continue
            ends = list(accumulate(len(piece) for piece in pieces if piece is not None))
            for cut in (ends.index(end) + 1 for end in (len(before) + 1, len(before)) if end in ends):
                if self.bytes(ids[cut:]) == wanted:
                    return ids[cut:]
        return None

    def _ids(self, text: str) -> list[int]:
        return list(self.core.encode(text, add_special_tokens=False).ids)


def token_bytes(tokenizer: PreTrainedTokenizerBase, whose: str) -> TokenBytes:
    """The texts of a tokenizer's ids: byte-level BPE, SentencePiece with or without byte fallback, characters, words.

    Raises:
        IncompatibleError: texts are not its tokens one after the other, so that a token alone has no text; `whose`
            names the model.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, Tokenizer):
        raise IncompatibleError(
            f"{whose} has a tokenizer ({type(tokenizer).__name__}) that is not one of the library tokenizers, whose "
            "tokens can be taken apart into bytes; take a model with a fast tokenizer"
        )
    steps = _steps(core)
    if steps is None:
        raise IncompatibleError(
            f"{whose} has a tokenizer whose texts are not its tokens one after the other (its decoder changes what "
            "stands between them); tokenizer: own takes byte-level, SentencePiece and character tokenizers"
        )
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(tokenizer.all_special_ids)
    of: dict[int, bytes] = {}
    raw = set()
    falls_back = any(step["type"] == "ByteFallback" for step in steps)
    for token, i in tokenizer.get_vocab().items():
        if i in control:
            continue
        of[i] = _bytes(token, steps)
        if falls_back and RAW.fullmatch(token):
            raw.add(i)
    private = deepcopy(core)
    private.encode_special_tokens = True
    private.no_truncation()
    private.no_padding()
    names = {str(tokenizer.convert_ids_to_tokens(i)): i for i in sorted(control, reverse=True)}
    # Some tokenizers name the end token as the unknown one.
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    return TokenBytes(of, names, unknown, frozenset(raw), private)


def _steps(core: Tokenizer) -> list[dict[str, Any]] | None:
    """The steps of a tokenizer's decoder; None where they do not leave each token its text."""
    if core.decoder is None:
        return None
    told = json.loads(core.decoder.__getstate__())
    steps = list(told["decoders"]) if told["type"] == "Sequence" else [told]
    return steps if all(_known(step) for step in steps) else None


def _known(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return "String" in step["pattern"]
    return step["type"] in ("ByteLevel", "ByteFallback", "Metaspace", *PASSED)


def _bytes(token: str, steps: Sequence[Mapping[str, Any]]) -> bytes:
    text = token
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            found = [LETTERS.get(letter) for letter in text]
            return text.encode() if None in found else bytes(b for b in found if b is not None)
        if kind == "ByteFallback" and (hit := RAW.fullmatch(text)):
            return bytes([int(hit[1], 16)])
        if kind == "Replace":
            text = text.replace(step["pattern"]["String"], step["content"])
        if kind == "Metaspace":
            text = text.replace(step["replacement"], " ")
    return text.encode()


def _letters() -> dict[str, int]:
    """The byte of each letter in which byte-level BPE writes its tokens: printable bytes are letters themselves, and
    the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


LETTERS = _letters()
