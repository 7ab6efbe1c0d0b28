"""Teachers that write: what an expert of a debate says about many prompts at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from opd.context import Context
from opd.errors import IncompatibleError
from opd.language.agreement import end_ids
from opd.language.engines.base import Drawing, ids_of
from opd.language.engines.in_process import InProcess
from opd.language.tokens import Tokens, tokens_of
from opd.prompts import Prompt
from opd.remote.client import RequestError
from opd.remote.writing import Drawn, Draws, write_job
from opd.teachers.base import LiveTeacher
from opd.teachers.local import LanguageTeacher
from opd.teachers.served import LiveServedTeacher
from opd.teachers.translated import TranslatedTeacher

WRITE = ("opd", "vllm")
"""Servers that say which ids they wrote."""

SEEDS = 2**63


class Said(NamedTuple):
    """A text, the tokens that it took, and those that were read before it; or why there is none."""

    text: str
    written: int = 0
    read: int = 0
    failure: str | None = None


@dataclass(frozen=True)
class Manner:
    """How experts write: temperature, cuts, and the most tokens of a text."""

    temperature: float
    top_p: float
    top_k: int
    budget: int


class Speaker(ABC):
    """One expert's pen."""

    @abstractmethod
    def begin(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], manner: Manner, context: Context
    ) -> Callable[[], list[Said]]:
        """Have one text written about each prompt, as the student would see it, and return what waits for them. What
        is elsewhere begins at once; a model in this process writes when it is waited for.

        Args:
            seeds: of each text; it depends on its own seed and prompt alone.
            context: gives the ids that count.
        """


def speaker_of(teacher: LiveTeacher, which: str) -> Speaker:
    """What writes for a teacher; `which` names it.

    Raises:
        IncompatibleError: it cannot write.
    """
    if isinstance(teacher, LanguageTeacher):
        return LocalSpeaker(teacher)
    if isinstance(teacher, LiveServedTeacher):
        return ServedSpeaker(teacher, which)
    members = teacher.members()
    if teacher not in members.values():
        return RoutedSpeaker(teacher, {tag: speaker_of(m, f"{which}, route {tag!r}") for tag, m in members.items()})
    if isinstance(teacher, TranslatedTeacher):
        raise IncompatibleError(
            f"{which} has tokenizer: own, and experts who debate write and read in the student's tokens; take an "
            "expert of the student's tokenizer, or rounds: 0"
        )
    raise IncompatibleError(f"{which} ({type(teacher).__name__}) writes no texts; take kinds local, served or routed")


def _own(reader: InProcess, context: Context) -> Tokens:
    """The run's common ids, with the ends of whoever writes: an expert's text is no completion of the student's."""
    tokens = tokens_of(context)
    return Tokens(tokens.vocabulary, tuple(sorted(end_ids(reader) or tokens.end_ids)))


class LocalSpeaker(Speaker):
    """A model in this process."""

    def __init__(self, teacher: LanguageTeacher):
        self.teacher = teacher

    def begin(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], manner: Manner, context: Context
    ) -> Callable[[], list[Said]]:
        return lambda: self._written(prompts, seeds, manner, context)

    @torch.no_grad()
    def _written(self, prompts: Sequence[Prompt], seeds: Sequence[int], manner: Manner, context: Context) -> list[Said]:
        teacher, language = self.teacher, self.teacher.language
        contexts = [language.encode(prompt) for prompt in prompts]
        own = context.with_(temperature=manner.temperature, agreed=_own(language, context))
        drawing = Drawing(own, manner.top_p, manner.top_k, batch=teacher.settings.batch)
        if teacher.offload:
            language.to(teacher.device)
        # As rollouts do, and not as what is scored within the same step.
        with torch.autocast(language.device.type, enabled=False):
            rows = language.sample(contexts, 1, manner.budget, seeds, drawing)
        if teacher.offload:
            language.to("cpu")
        return [
            Said(language.decode(row.actions), len(row.actions), len(context))
            for row, context in zip(rows, contexts, strict=True)
        ]


class ServedSpeaker(Speaker):
    """A model behind a server, all of whose texts are asked for at once."""

    def __init__(self, teacher: LiveServedTeacher, which: str):
        self.teacher = teacher
        if teacher.found.kind not in WRITE:
            raise IncompatibleError(
                f"{which}: {teacher.settings.url[0]} is a server of kind {teacher.found.kind}, which does not say "
                "which ids it writes: serve it with vLLM or `opd serve`"
            )

    def begin(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], manner: Manner, context: Context
    ) -> Callable[[], list[Said]]:
        reader, client = self.teacher.reader, self.teacher.client
        ids = [ids_of(reader.encode(prompt)).tolist() for prompt in prompts]
        draws = Draws(manner.temperature, manner.top_p, manner.top_k, _own(reader, context).end_ids)
        model = self.teacher.found.model
        begun = [
            client.submit(write_job(model, one, manner.budget, seed % SEEDS, draws))
            for one, seed in zip(ids, seeds, strict=True)
        ]
        return lambda: [self._said(one.result(), len(read)) for one, read in zip(begun, ids, strict=True)]

    def _said(self, found: Drawn | RequestError, read: int) -> Said:
        if isinstance(found, RequestError):
            return Said("", failure=f"debating: {found.reason}")
        return Said(self.teacher.reader.decode(found.actions), len(found.actions), read)


class RoutedSpeaker(Speaker):
    """An expert that is another model for each kind of prompt."""

    def __init__(self, teacher: LiveTeacher, routes: dict[str, Speaker]):
        self.teacher, self.routes = teacher, routes

    def begin(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], manner: Manner, context: Context
    ) -> Callable[[], list[Said]]:
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            rows.setdefault(str(self.teacher.route(prompt)), []).append(i)
        begun = {
            tag: self.routes[tag].begin([prompts[i] for i in mine], [seeds[i] for i in mine], manner, context)
            for tag, mine in rows.items()
        }

        def collected() -> list[Said]:
            found = {i: said for tag, mine in rows.items() for i, said in zip(mine, begun[tag](), strict=True)}
            return [found[i] for i in range(len(prompts))]

        return collected


def shown(prompt: Prompt, view: object) -> Prompt:
    """A prompt whose view is another, with all of its columns."""
    return replace(prompt, fields={**prompt.fields, COLUMN: view}, column=COLUMN)


COLUMN = "(debate)"
"""Column of a view that no data holds."""
