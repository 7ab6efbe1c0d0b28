"""What tests of other people's models share: a tokenizer with turns and special tokens, and one short run."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import opd

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ +-=?.,#:\n'\"_{}[]()/"
SPECIAL = ("<pad>", "<eos>", "<unk>", "<bos>", "<turn>", "<end_of_turn>", "<think>", "</think>")
"""Ids 0 to 7; a turn ends with id 5, a text with id 1."""
CHAT = (
    "{% if tools %}T:{{ tools | length }}\n{% endif %}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
TEXTS = ["add 1+2=", "what is the name of a cat?", "z", "count to ten", "say hi", "one two three", "ab", "hello there"]


def turn_tokenizer(template=None, *, begins=False, ends=False, eos="<eos>", extra=()):
    """One id a character behind `SPECIAL`; `begins` and `ends`: texts get a begin or an end token when encoded."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS, *extra))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if begins or ends:
        core.post_processor = processors.TemplateProcessing(
            single=("<bos> " if begins else "") + "$A" + (" <eos>" if ends else ""),
            special_tokens=[("<bos>", 3), ("<eos>", 1)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        additional_special_tokens=["<turn>", "<end_of_turn>", "<think>", "</think>", *extra],
        clean_up_tokenization_spaces=False,
    )
    if template:
        tokenizer.chat_template = template
    return tokenizer


def saved(folder, model, tokenizer):
    """A model folder as `from_pretrained` reads it; returns its path as text."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def short_run(output, student, teacher, prompts=TEXTS, **changes):
    """`opd.distill` for two small steps, in place of an earlier run unless it is to go on."""
    settings = {
        "overwrite": "resume" not in changes,
        "steps": 2,
        "batch": {"prompts": 4, "micro": 4},
        "rollout": {"max_new_tokens": 12},
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "update": {"learning_rate": 1e-3},
        "output": str(output),
        **changes,
    }
    return opd.distill(student, teacher, prompts, quiet=True, **settings)
