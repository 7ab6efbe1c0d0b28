"""How a recipe's texts compare under the student's tokenizer and those that its teachers have of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.choice import nested
from opd.distributions import Vocabulary
from opd.errors import OpdError
from opd.language.agreement import common_vocabulary, end_ids
from opd.language.alignment import shares
from opd.language.engines.in_process import InProcess
from opd.language.engines.transformers import LanguageModel
from opd.language.identity import PROBE
from opd.language.model import is_own, load_tokenizer
from opd.language.tokens import Tokens
from opd.planning import Shape, bytes_text
from opd.recipe import Recipe
from opd.teachers.local import LocalTeacher
from opd.teachers.served import ServedTeacher
from opd.teachers.translated import pair_of

TEXTS = 256
"""Prompts that are read for it."""


def own_tokenizers(
    recipe: Recipe, student: InProcess, texts: Sequence[str], shapes: Sequence[Shape], notes: list[str]
) -> tuple[tuple[str, str], ...]:
    """What is known, before a run, of each teacher with a tokenizer of its own, by name: tokens in common, the share of
    the prompts' bytes that is one token on both sides, and what it costs. Of a tokenizer that is not on this machine
    the notes say so.

    Raises:
        IncompatibleError: a tokenizer that cannot be taken apart.
    """
    told: list[tuple[str, str]] = []
    tokens = Tokens(
        common_vocabulary([student], [Vocabulary(len(student.tokenizer))]),
        tuple(recipe.end_tokens or sorted(end_ids(student))),
    )
    for settings in (part for teacher in recipe.teacher for part in nested(teacher)):
        if not isinstance(settings, LocalTeacher | ServedTeacher) or not is_own(settings.tokenizer):
            continue
        name = settings.name or settings.model or settings.kind
        try:
            teacher = own_reader(settings)
        except OpdError:
            notes.append(f"{name}: its tokenizer is not on this machine, and nothing is said of tokens in common")
            continue
        teacher.owner = f"the teacher {name}"
        pair = pair_of(student, teacher, tokens)
        found = shares(pair, [*texts[:TEXTS]] or [PROBE])
        whose = "prompts' bytes" if texts else "bytes of a short text"
        width, size = next(((s.width, s.size) for s in shapes if s.name == settings.model), (0, 0))
        told += [
            (
                f"{name}: tokens in common",
                f"{found.common} of the student's {found.of['student']} and the teacher's {found.of['teacher']}",
            ),
            (f"{name}: one token on both sides", f"{found.single:.1%} of the {whose}"),
            (f"{name}: several tokens on a side", f"{found.several:.1%} of the {whose}"),
            (f"{name}: its tokens for one of the student's", f"{found.tokens:.2f}"),
        ]
        if width:
            rows = len(pair.common[0]) * width * size
            told.append((f"{name}: rows of its head, a second time", bytes_text(rows)))
    return tuple(told)


def own_reader(settings: LocalTeacher | ServedTeacher) -> LanguageModel:
    """What a teacher reads with, from files on this machine alone."""
    if isinstance(settings, ServedTeacher):
        return settings.reader(None)
    tokenizer = load_tokenizer(settings, local_only=True)
    options: dict[str, Any] = settings.template_options
    return LanguageModel(None, tokenizer, settings.template, options)
