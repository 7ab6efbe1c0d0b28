"""Small tokenizers of the kinds that models have, trained here, and texts that tell them apart."""

from __future__ import annotations

import functools

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog and the dog looks at the fox for 12 minutes",
    "She said: hello there, hello world! What is 3.50 + 12? It is 15.50, of course.",
    "naïve café Zoë über straße; the theory of the thing there, then them and these",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))  # 42",
] * 3

TEXTS = [
    "the lazy dog",
    " hello there",
    "hello  there,   fox",
    "12 + 3.50 = 15.50",
    "Zoë paid 3.50 for 12 apples;\n  then left.\t<b>ok</b>",
    "🙂 and 👩‍👩‍👧 went home",
    "e\u0301 is not é, and n\u0303 is not ñ",
    "שלום עולם and مرحبا",
    "<|im_end|> is not the end, nor is <eos> or <end_of_turn>",
    "\n\n\n",
    "日本語のテキスト",
    "the▁underline is a letter too",
]
"""Spaces at the beginning, numbers, emoji, combining marks, right to left, chat markers."""

CONTROL = ["<eos>", "<unk>", "<pad>", "<turn>", "<end_of_turn>"]
RAW = [f"<0x{byte:02X}>" for byte in range(256)]
CHAT = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


def _fast(core: Tokenizer, chat: bool = False) -> PreTrainedTokenizerFast:
    more = {"additional_special_tokens": ["<turn>", "<end_of_turn>"]} if chat else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        **more,
    )
    if chat:
        made.chat_template = CHAT
    return made


@functools.cache
def byte_level(size: int = 420, chat: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen and SmolLM have it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return _fast(core, chat)


@functools.cache
def sentencepiece(size: int = 460, prefix: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """As Gemma has it, and with `prefix` as Llama 2: a space is put before every text."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    core.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=[^▁])(?=▁)"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*CONTROL, *RAW], show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    made = _fast(core, chat)
    # Raw bytes are text: a trainer has no other way to keep them than to call them special.
    return _unspecial(made)


def _unspecial(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    import json

    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["added_tokens"] = [token for token in told["added_tokens"] if token["content"] not in RAW]
    chat = tokenizer.chat_template is not None
    return _fast(Tokenizer.from_str(json.dumps(told)), chat)


@functools.cache
def characters() -> PreTrainedTokenizerFast:
    """One id a character of those that the corpus has."""
    known = [*CONTROL, *sorted(set("".join(CORPUS)))]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return _fast(core)


@functools.cache
def lower_case() -> PreTrainedTokenizerFast:
    """One that does not give back what it read."""
    core = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    core.normalizer = normalizers.Lowercase()
    return _fast(core)


KINDS = {
    "byte level": byte_level,
    "byte level, larger": functools.partial(byte_level, 520),
    "sentencepiece": sentencepiece,
    "sentencepiece with a space before": functools.partial(sentencepiece, 460, True),
    "characters": characters,
}
