"""The task of the reproduction of DP-OPD: short reviews from a grammar whose every probability is known.

A review has a public code (one of 8 types, one of 5 star ratings) and 4 phrases of 6 words, each word of a phrase from
a class of its own. Which word of its class comes depends on the code and on the cluster of the word before. Private
reviews come from other word statistics for each type: `shift` says how far away. The prompt is the code and the first
quarter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from pydantic import Field
from transformers import PreTrainedTokenizerFast

from opd.errors import DataError
from opd.language.creation import symbol_tokenizer
from opd.prompts.base import Prompts

TYPES, STARS, CLASSES, WORDS, CLUSTERS, PHRASES, QUARTER = 8, 5, 6, 80, 4, 4, 1
"""Of the code, of a phrase, of a class, phrases of a review, and of those in the prompt."""
STRENGTH = 0.9
"""Standard deviation of what type, stars and the word before add to a word's logit."""
GRAMMAR = 20260406
"""Seed of the tables, the same for every arm and seed."""


def word(of_class: int, number: int) -> str:
    return f"{'abcdef'[of_class]}{number}"


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word: 13 of codes and 480 of reviews."""
    codes = [f"type{i}" for i in range(TYPES)] + [f"stars{i}" for i in range(STARS)]
    return symbol_tokenizer([*codes, *(word(c, w) for c in range(CLASSES) for w in range(WORDS))], words=True)


@cache
def table(shift: float) -> np.ndarray:
    """float64 `[CLASSES, TYPES, STARS, CLUSTERS, WORDS]`, the probability of each word of its class after a word of
    each cluster; a review begins as after cluster 0. Private reviews have a `shift` of more than 0."""
    random = np.random.default_rng(GRAMMAR)
    base = random.normal(size=(CLASSES, 1, 1, 1, WORDS))
    of_type = random.normal(size=(CLASSES, TYPES, 1, 1, WORDS))
    of_stars = random.normal(size=(CLASSES, 1, STARS, 1, WORDS))
    of_before = random.normal(size=(CLASSES, 1, 1, CLUSTERS, WORDS))
    moved = random.normal(size=(CLASSES, TYPES, 1, 1, WORDS))
    logits = base + STRENGTH * (of_type + of_stars + of_before) + shift * moved
    found = np.exp(logits - logits.max(-1, keepdims=True))
    made: np.ndarray = found / found.sum(-1, keepdims=True)
    return made


def reviews(size: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`(codes [size, 2], words [size, PHRASES * CLASSES])`: numbers of types and stars, and of words in their class."""
    random, chances = np.random.default_rng([GRAMMAR, seed]), table(shift)
    codes = np.stack([random.integers(TYPES, size=size), random.integers(STARS, size=size)], 1)
    words = np.zeros((size, PHRASES * CLASSES), dtype=np.int64)
    before = np.zeros(size, dtype=np.int64)
    for place in range(words.shape[1]):
        row = chances[place % CLASSES, codes[:, 0], codes[:, 1], before % CLUSTERS]
        drawn = (row.cumsum(1) < random.random(size)[:, None]).sum(1)
        words[:, place] = before = drawn.clip(max=WORDS - 1)
    return codes, words


def entropy(size: int, shift: float, seed: int) -> float:
    """Nats a word of the continuation, the least loss that any model can have, over `size` reviews."""
    codes, words = reviews(size, shift, seed)
    chances, total = table(shift), 0.0
    for place in range(QUARTER * CLASSES, words.shape[1]):
        row = chances[place % CLASSES, codes[:, 0], codes[:, 1], words[:, place - 1] % CLUSTERS]
        total -= float((row * np.log(row)).sum(1).mean())
    return total / (words.shape[1] - QUARTER * CLASSES)


def text(words: Sequence[int], first: int = 0) -> str:
    return " ".join(word((first + i) % CLASSES, int(w)) for i, w in enumerate(words))


def score(prompt: str, completion: str, shift: float) -> tuple[list[float], list[bool]]:
    """Of each word that a student wrote behind a prompt: nats of loss under the true grammar, and whether it is of the
    right class. A word of another class has the loss of one drawn from all, and the word behind it is taken as after
    cluster 0."""
    kind, stars, *known = prompt.split()
    codes = int(kind.removeprefix("type")), int(stars.removeprefix("stars"))
    before, losses, right = int(known[-1][1:]), [], []
    for i, written in enumerate(completion.split()):
        of_class = (len(known) + i) % CLASSES
        fits = written[:1] == "abcdef"[of_class] and written[1:].isdigit()
        right.append(fits)
        chance = 1 / (CLASSES * WORDS)
        if fits:
            chance = table(shift)[of_class, codes[0], codes[1], before % CLUSTERS, int(written[1:])]
        losses.append(-math.log(chance))
        before = int(written[1:]) if fits else 0
    return losses, right


class ReviewPrompts(Prompts):
    """Reviews of the grammar: `prompt` is the code and the first quarter, `response` the rest."""

    kind: Literal["dp_opd_reviews"] = "dp_opd_reviews"
    size: int = Field(20_000, ge=1, description="Rows")
    shift: float = Field(0.0, ge=0, description="How far the word statistics are from the public ones")
    seed: int = Field(0, ge=0, description="Of the draws; another one is another set of rows of the same grammar")

    def rows(self) -> Sequence[tuple[str, dict[str, Any] | DataError]]:
        codes, words = reviews(self.size, self.shift, self.seed)
        cut, found = QUARTER * CLASSES, []
        for i, ((kind, stars), row) in enumerate(zip(codes.tolist(), words.tolist(), strict=True)):
            fields = {
                "id": f"{self.seed}-{self.shift:g}-{i}",
                "prompt": f"type{kind} stars{stars} {text(row[:cut])}",
                "response": " " + text(row[cut:], cut),
            }
            found.append((f"reviews:{i}", fields))
        return found
