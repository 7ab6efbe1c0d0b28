"""A teacher behind a server: given ids go out, what its model says of them comes back."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field, ValidationInfo, field_validator

from opd.context import Context
from opd.distributions import Aligned, Categorical, Distribution, Head, Sampled, Spans, Target, Told, TopK, Vocabulary
from opd.errors import DataError, IncompatibleError, ModelError, RecipeError
from opd.language.engines.base import ids_of
from opd.language.engines.in_process import InProcess, language_of
from opd.language.engines.transformers import LanguageModel
from opd.language.identity import PROBE
from opd.language.model import ModelSettings, is_own, load_tokenizer, own_place
from opd.language.tokens import tokens_of
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.remote.client import Job, RequestError
from opd.remote.dialects import Dialect, Scored
from opd.remote.exact import WireDtype, head_job, score_job
from opd.remote.launch import ended_at
from opd.remote.settings import Reached
from opd.remote.start import Found, look, probe, refused, split_alike
from opd.teachers.base import LiveTeacher, answers_whole_texts_alone
from opd.teachers.showing import ShowingTeacher
from opd.teachers.translated import TranslatedTeacher, translated
from opd.trajectories import Trajectories

KINDS: dict[str, type[Distribution]] = {"exact": Categorical, "top_k": TopK, "sampled": Sampled}
"""The distribution that each kind of answer is."""

T = TypeVar("T")

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt as the teacher reads it, and of what was written behind it."""


class ServedTeacher(Reached, ShowingTeacher):
    """Scores the student's exact token ids over HTTP: `opd serve`, vLLM, SGLang, or another server whose
    `/v1/completions` echoes log-probabilities. Trajectories that it does not answer are in nothing of their step.

    What vLLM and SGLang can say are the `top_k` likeliest ids at each position with the rest as a tail, or the
    log-probability of the tokens that the student drew; `opd serve` says whole distributions.
    """

    kind: Literal["served"] = "served"
    place: ClassVar[str] = "teacher"
    modality: ClassVar[str | None] = "language"
    tokenizer: str | None = Field(
        None,
        description="The teacher's tokenizer, a folder or hub name; default the student's, with its template. "
        "own:PLACE where it is another one than the student's",
    )
    template: Literal["chat", "plain"] | None = Field(
        None, description="How prompts become ids; default chat where the tokenizer has a template"
    )
    template_options: dict[str, Any] = Field(default={}, description="Passed to the chat template (enable_thinking)")
    dialect: Literal["auto", "opd", "vllm", "sglang", "openai"] = Field(
        "auto", description="How the server is asked; auto: found out at the start"
    )
    answers: Literal["auto", "exact", "top_k", "sampled"] = Field(
        "auto",
        description="What is asked for at each position: whole distributions (of opd serve alone), the top_k likeliest "
        "ids, or the token that was sampled; auto: exact of opd serve and top_k of others",
    )
    top_k: int = Field(20, ge=1, le=100_000, description="Ids at each position, with answers: top_k")
    wire: WireDtype | None = Field(
        None, description="dtype of hidden states on their way, with answers: exact; default that of the weights there"
    )

    @field_validator("tokenizer")
    @classmethod
    def _somewhere(cls, value: str | None) -> str | None:
        if is_own(value) and own_place(value) is None:
            raise ValueError("a server does not hand out its tokenizer; say where it is, e.g. own:org/model")
        return value

    @field_validator("answers")
    @classmethod
    def _of_a_dialect(cls, value: str, info: ValidationInfo) -> str:
        if value == "exact" and info.data.get("dialect") not in ("auto", "opd"):
            raise ValueError(
                f"a server of dialect {info.data.get('dialect')} does not give whole distributions; take answers: "
                "top_k, or serve the teacher with `opd serve`"
            )
        return value

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        notes.append(f"{', '.join(self.url)}: the teacher is asked over HTTP and takes no memory here")
        return []

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        own = is_own(self.tokenizer)
        if self.answers == "auto" and self.dialect in ("auto", "opd"):
            return [(Aligned if own else Categorical, "the server")] if self.dialect == "opd" else []
        kind = KINDS["top_k" if self.answers == "auto" else self.answers]
        if own:
            kind = Spans if kind is Sampled else Aligned
        return [(kind, f"the server (answers: {self.answers})")]

    def check_temperature(self, temperature: float) -> None:
        if self.answers in ("top_k", "sampled") or self.dialect not in ("auto", "opd"):
            check_temperature(temperature)

    @property
    def listed(self) -> int | None:
        return self.top_k if self.answers == "top_k" else None

    def check_scorer(self, home: torch.device) -> None:
        raise answers_whole_texts_alone(self)

    def build(self, context: Context, student: Student | None) -> LiveServedTeacher | TranslatedTeacher:
        own = None if student is None else language_of(student, "the student")
        made = LiveServedTeacher(self, self.reader(own), context.seed)
        return translated(made, made.reader, student) if is_own(self.tokenizer) else made

    def reader(self, student: InProcess | None) -> LanguageModel:
        """What makes ids of prompts: a tokenizer and a template, without weights."""
        place = own_place(self.tokenizer)
        if place is None:
            if student is None:
                raise RecipeError("teacher.tokenizer is required here: a folder or hub name of the teacher's tokenizer")
            tokenizer, template = student.tokenizer, self.template or student.template
            options = self.template_options or (student.template_options if template == "chat" else {})
        else:
            settings = ModelSettings(model=place, template="plain")
            tokenizer = load_tokenizer(settings)
            template, options = self.template or ("chat" if tokenizer.chat_template else "plain"), self.template_options
        if template == "chat" and not tokenizer.chat_template:
            raise ModelError("teacher.template is chat and the tokenizer has no chat template; set template: plain")
        return LanguageModel(None, tokenizer, template, options)


def check_temperature(temperature: float) -> None:
    """Raise `IncompatibleError` for one that servers do not score at."""
    if temperature != 1.0:
        told = f"{temperature:g}" if isinstance(temperature, float) else "a schedule"
        raise IncompatibleError(
            f"temperature is {told}, and a server scores at 1: set temperature=1, or serve the teacher with "
            "`opd serve` and take answers: exact, which any temperature can be applied to"
        )


class LiveServedTeacher(LiveTeacher[ServedTeacher]):
    """The built teacher: every replica was asked about a known text, and answered as it must.

    Args:
        reader: makes ids of prompts.
        seed: of the jitter in waits.

    Raises:
        RecipeError: there is no key where the settings say.
        ModelError: a server cannot be reached, or does not score given ids.
        IncompatibleError: it cannot give what is asked for, or replicas differ.
    """

    def __init__(self, settings: ServedTeacher, reader: LanguageModel, seed: int = 0):
        self.settings, self.reader = settings, reader
        reader.owner = f"the teacher {settings.name or settings.model or settings.url[0]}"
        self.client = settings.client(seed)
        self.failed: Counter[str] = Counter()
        self._expected: dict[Text, tuple[int, Future[Scored | RequestError]]] = {}
        self._turn, self._lock = 0, threading.Lock()
        self._notes: list[str] = []
        self.head: Head | None = None
        self._placed: Head | None = None
        self.dialect: Dialect | None = None
        # Who cannot be used keeps no thread.
        with ExitStack() as opened:
            opened.callback(self.client.close)
            self.found = self._replicas()
            self.answers = KINDS[self._kind_of_answers()]
            self.k = settings.top_k if self.answers is TopK else 0
            self._probe()
            opened.pop_all()

    # -- at the start ----------------------------------------------------------------------------------------------

    def _replicas(self) -> Found:
        """The first replica, after all of them were looked at."""
        settings = self.settings
        found = [look(self.client, url, settings.dialect, settings.model) for url in settings.url]
        first = found[0]
        for url, other in zip(settings.url, found, strict=True):
            weights = [each.about.weights if each.about else None for each in (first, other)]
            if (other.kind, other.model) != (first.kind, first.model) or weights[0] != weights[1]:
                raise IncompatibleError(
                    f"{settings.url[0]} and {url} are no replicas: they serve {first.model!r} by {first.kind} and "
                    f"{other.model!r} by {other.kind}, or other weights; list replicas of one model in teacher.url"
                )
        lengths = [each.longest for each in found if each.longest is not None]
        about = first.about
        if about is not None and about.tokenizer != self.reader.tokenizer_hash:
            raise IncompatibleError(
                f"{settings.url[0]} serves a model with another tokenizer than the one that prompts are read with here "
                f"({settings.tokenizer or 'the student has it'}); name the served model's in teacher.tokenizer"
            )
        if about is not None and about.template != self.reader.template_hash:
            self._notes.append(
                "the teacher's prompts are written with another template than the served model's own: "
                "teacher.tokenizer, template and template_options set it"
            )
        self._notes += settings.told_of_key()
        return replace(first, longest=min(lengths, default=None))

    def _kind_of_answers(self) -> str:
        wanted = self.settings.answers
        if wanted == "exact" and self.found.about is None:
            raise IncompatibleError(
                f"teacher.answers is exact, and {self.settings.url[0]} does not give whole distributions: serve the "
                "teacher with `opd serve`, or take answers: top_k"
            )
        return wanted if wanted != "auto" else "top_k" if self.found.about is None else "exact"

    def _probe(self) -> None:
        """Ask every replica about a text whose answer must have a certain form."""
        ids = list(self.reader.tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        if len(ids) < 2:
            raise ModelError("the teacher's tokenizer makes no tokens of a plain text; set teacher.tokenizer")
        about = self.found.about
        for url in self.settings.url:
            if self.answers is Categorical:
                assert about is not None
                self._at_start(score_job([ids[:1]], [ids[1:]], about, self.wire), url)
                continue
            scored = replace(self.found, kind="vllm") if about is not None else self.found
            self.dialect = probe(self.client, url, scored, ids, self.k)
            if not split_alike(self.client, url, scored, PROBE, ids):
                raise IncompatibleError(
                    f"{url} makes other ids of a text than the tokenizer that prompts are read with here "
                    f"({self.settings.tokenizer or 'the student has it'}); name the served model's in teacher.tokenizer"
                )
        if self.answers is Categorical:
            assert about is not None
            self.head = self._at_start(head_job(about), self.settings.url[0])
            self.vocabulary = Vocabulary(about.rows)

    def _at_start(self, job: Job[T], url: str) -> T:
        try:
            return self.client.ask(job, url)
        except RequestError as error:
            raise refused(url, error) from None

    @property
    def wire(self) -> WireDtype:
        """What hidden states travel in."""
        own = None if self.found.about is None else self.found.about.dtype
        return self.settings.wire or ("bfloat16" if own == "bfloat16" else "float32")

    @property
    def notes(self) -> list[str]:
        return [*self._notes, *self.reader.notes]

    def close(self) -> None:
        with self._lock:
            self._expected.clear()
        self.client.close()

    def failures(self) -> dict[str, int]:
        ended = ended_at(self.settings.url[0]) if self.failed["connection"] else None
        return {
            f"{reason} ({ended})" if ended and reason == "connection" else reason: count
            for reason, count in self.failed.items()
        }

    def identity(self) -> str | None:
        # Others do not say what they hold: their model's name has to do.
        about = self.found.about
        return f"served:{self.found.model}" if about is None else about.weights

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        about = self.found.about
        for prompt in prompts:
            ids = ids_of(self.reader.encode(*self.settings.view(prompt)))
            if about is not None and len(ids) and int(ids.max()) >= about.rows:
                raise DataError(
                    f"{prompt.where}: prompt {prompt.id!r} has the id {int(ids.max())} for the teacher, and the model "
                    f"at {self.settings.url[0]} ends at {about.rows - 1}: name the served model's tokenizer in "
                    "teacher.tokenizer, or leave the prompt out"
                )

    def check_lengths(self, prompts: Sequence[Prompt], budget: int, which: str) -> list[str]:
        longest = max((self.prompt_length(prompt) for prompt in prompts), default=1)
        needed = longest + budget + (0 if self.dialect is None else self.dialect.spare)
        if self.found.longest is not None and needed > self.found.longest:
            raise ModelError(
                f"{which}'s server takes texts of {self.found.longest} tokens, and the longest prompt has {longest} "
                f"and a completion up to {budget}: start it with --max-model-len {needed}, or shorten "
                "rollout.max_new_tokens (and evaluation.max_new_tokens)"
            )
        return []

    def prompt_length(self, prompt: Prompt) -> int:
        return len(self.reader.encode(*self.settings.view(prompt)))

    def check_student(self, student: Student, context: Context) -> None:
        self.check_context(context)

    def check_context(self, context: Context) -> None:
        """Raise `IncompatibleError` where the server's numbers are not those of the agreed temperature and ids."""
        compared = tokens_of(context).vocabulary
        if self.head is not None:
            self.head.over(compared, self.settings.url[0])
            return
        check_temperature(context.temperature)
        if compared.ids is not None:
            raise IncompatibleError(
                f"this run compares a slice of the vocabulary ({compared}), and a server's numbers are over all ids: "
                "serve the teacher with `opd serve` and take answers: exact"
            )
        most = tokens_of(context).count
        if self.k and most is not None and self.k >= most:
            raise IncompatibleError(
                f"teacher.top_k is {self.k}, and student and teacher have {most} ids in common; give {most - 1} or less"
            )

    # -- at every step ---------------------------------------------------------------------------------------------

    @property
    def early(self) -> bool:  # type: ignore[override]
        # Whole distributions are asked for in batches that only the step knows.
        return self.head is None

    def expect(self, prompt: Prompt, actions: torch.Tensor) -> None:
        context, completion = ids_of(self.reader.encode(*self.settings.view(prompt))).tolist(), actions.tolist()
        if self.early and completion:
            begun: Future[Scored | RequestError] = self.client.submit(self._job(context, completion))
            with self._lock:
                self._expected[tuple(context), tuple(completion)] = (self._turn, begun)

    def _job(self, context: list[int], completion: list[int]) -> Job[Scored]:
        assert self.dialect is not None
        return self.dialect.job(self.found.model, context + completion, len(context), self.k)

    def _of(self, contexts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[Scored | RequestError]:
        """The answers about these, in order; what was asked before is waited for."""
        keys = [(tuple(context), tuple(completion)) for context, completion in zip(contexts, completions, strict=True)]
        with self._lock:
            early = [self._expected.pop(key, None) for key in keys]
            # Written and never asked about, as rows that were written anew; those of the next step may be there.
            for key in [key for key, (turn, _) in self._expected.items() if turn < self._turn]:
                self._expected.pop(key)[1].cancel()
            self._turn += 1
        jobs = [self._job(contexts[i], completions[i]) for i, one in enumerate(early) if one is None]
        answers: list[Scored | RequestError] = self.client.ask_all(jobs)
        asked = iter(answers)
        return [next(asked) if one is None else one[1].result() for one in early]

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: ServedTeacher, context: Context) -> list[Target]:
        contexts = [ids_of(self.reader.encode(*settings.view(p))).tolist() for p in trajectories.prompts]
        completions = [actions.tolist() for actions in trajectories.completions()]
        # One that is empty says nothing and is asked about by nobody.
        asked = [i for i, completion in enumerate(completions) if completion]
        if self.head is not None:
            rows, lost = self._hidden(contexts, completions, asked)
        else:
            rows, lost = self._scored(contexts, completions, asked, context)
        missing = torch.tensor([i in lost for i in range(len(completions))])
        missing = missing.repeat_interleave(trajectories.lengths).to(context.device)
        packed = [torch.cat(parts).to(context.device) for parts in zip(*rows, strict=True)]
        if self.head is not None:
            answer: Distribution = Categorical(packed[0], self._head_for(context))
        else:
            drawn, top = Sampled(packed[0]), TopK(packed[2], packed[1])
            told = Told(top, drawn) if is_own(settings.tokenizer) else top
            answer = drawn if self.answers is Sampled else told
        return [Target(answer, teacher=settings.name, missing=missing if bool(missing.any()) else None)]

    def _hidden(
        self, contexts: Sequence[list[int]], completions: Sequence[list[int]], asked: Sequence[int]
    ) -> tuple[list[tuple[torch.Tensor, ...]], set[int]]:
        """Hidden states `[T, D]` of each trajectory, `batch` of them in one request, and those that got none."""
        about = self.found.about
        assert about is not None
        size = min(self.settings.batch, about.batch)
        dtype = getattr(torch, self.wire)
        rows: list[tuple[torch.Tensor, ...]] = [
            (torch.full((len(each), about.width), torch.nan, dtype=dtype),) for each in completions
        ]
        lost: set[int] = set()
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        while parts:
            jobs = [
                score_job([contexts[i] for i in part], [completions[i] for i in part], about, self.wire)
                for part in parts
            ]
            alone: list[Sequence[int]] = []
            answers = self.client.ask_all(jobs)
            for part, found in zip(parts, answers, strict=True):
                if not isinstance(found, RequestError):
                    for i, hidden in zip(part, torch.split(found, [len(completions[i]) for i in part]), strict=True):
                        rows[i] = (hidden,)
                elif len(part) > 1 and not found.silent:
                    # One trajectory may have spoilt the answer about all. Where nobody answers, asking more often would
                    # only wait longer.
                    alone += [[i] for i in part]
                else:
                    self._count(found, len(part))
                    lost.update(part)
            parts = alone
        return rows, lost

    def _scored(
        self, contexts: Sequence[list[int]], completions: Sequence[list[int]], asked: Sequence[int], context: Context
    ) -> tuple[list[tuple[torch.Tensor, ...]], set[int]]:
        """float32 `[T]`, int64 `[T, K]` and float32 `[T, K]` of each trajectory, as `Scored` has them, and those that
        got none."""
        vocabulary, k = tokens_of(context).vocabulary, self.k
        rows: list[tuple[torch.Tensor, ...]] = [
            (torch.full((len(c),), torch.nan), torch.zeros(len(c), k).long(), torch.full((len(c), k), torch.nan))
            for c in completions
        ]
        lost: set[int] = set()
        answers = self._of([contexts[i] for i in asked], [completions[i] for i in asked])
        for i, found in zip(asked, answers, strict=True):
            if not isinstance(found, RequestError) and bool(vocabulary.outside(found.ids).any()):
                found = RequestError("ids that the student lacks", "among the likeliest")
            if isinstance(found, RequestError):
                self._count(found, 1)
                lost.add(i)
            else:
                rows[i] = tuple(found)
        return rows, lost

    def _count(self, error: RequestError, trajectories: int) -> None:
        self.failed[error.reason] += trajectories

    def _head_for(self, context: Context) -> Head:
        assert self.head is not None
        vocabulary = tokens_of(context).vocabulary
        placed = self._placed
        if placed is None or placed.weight.device != context.device or placed.vocabulary != vocabulary:
            self._placed = placed = self.head.over(vocabulary, self.settings.url[0]).to(context.device)
        return replace(placed, temperature=context.temperature)
