"""`opd score`: what a frozen teacher says about every row of a store, shard by shard; a killed job goes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch

from opd.assembly import compute_device, make_accelerator
from opd.choice import kind_of
from opd.context import Context
from opd.distributions import Head, Target
from opd.errors import DataError, IncompatibleError, RecipeError, RunError, nearest
from opd.jobs.work import work_through
from opd.language.agreement import check_tokenizers, common_vocabulary, end_ids
from opd.language.engines.base import EncodedPrompt
from opd.language.engines.in_process import InProcess
from opd.language.model import is_own
from opd.language.tokens import Tokens, tokens_of
from opd.monitor import Monitor
from opd.policies.causal_lm import CausalLM
from opd.policies.image_text import ImageText
from opd.prompts import Prompt, load_prompts
from opd.provenance import versions
from opd.recipe import Recipe
from opd.remote.launch import FOLDER, servers_of, started
from opd.store.pictures import pictures_of
from opd.store.shards import claim, tidy
from opd.store.store import Store, VocabularyHeader
from opd.store.targets import Kind, Targets, TargetsHeader
from opd.teachers import reasons, unanswered
from opd.teachers.image_text import ImageTextTeacher
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.teachers.routed import RoutedTeacher
from opd.teachers.served import LiveServedTeacher, ServedTeacher
from opd.teachers.translated import TranslatedTeacher
from opd.trajectories import Trajectories

DEFAULT_TOP_K = 64

Scoring = LocalTeacher | ImageTextTeacher | ServedTeacher
"""Settings of teachers that score a store: frozen models."""


class ScoringOptions(TypedDict, total=False):
    """What `Scorer` may be told beside the kind of targets, for whoever passes it on."""

    top_k: int | None
    dtype: Literal["bfloat16", "float32"]
    name: str | None
    teacher: str | None


class Scorer:
    """A loaded teacher that scores shards of one store. Several, in any processes, may share the work: `score` is safe
    to call for a shard that another one has scored or is scoring.

    Args:
        recipe: names the teacher, the student's tokenizer and the prompts.
        path: of the store.
        kind: what is kept.
        top_k: K, with kind top_k; default 64, or all but one of a smaller vocabulary.
        dtype: of the hidden states, with kind exact; bfloat16 takes `2 * D` bytes a token.
        name: of these targets; default the kind and the teacher's hash.
        teacher: name of the teacher in the recipe; default its only one.
    """

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        kind: Kind = "sampled",
        *,
        top_k: int | None = None,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        name: str | None = None,
        teacher: str | None = None,
    ):
        recipe = recipe.at(0, recipe.steps)
        self.store = Store.open(path)
        self.prompts = {p.id: p for p in load_prompts(recipe.prompts)}
        unknown = next((i for i in self.store.prompt_ids if i not in self.prompts), None)
        if unknown is not None:
            raise DataError(f"the store has a prompt {unknown!r} that the recipe's prompts have not; take its recipe")
        settings = chosen_teacher(recipe, teacher)
        own = is_own(settings.tokenizer)
        if own and kind != "sampled":
            raise IncompatibleError(
                f"--kind is {kind}, and the teacher has tokenizer: own: what it says of a store is kept span by span, "
                "with --kind sampled"
            )
        self.accelerator = make_accelerator(recipe)
        context = Context(device=compute_device(recipe, self.accelerator), temperature=float(recipe.temperature))
        if not isinstance(recipe.student, CausalLM | ImageText):
            raise IncompatibleError(
                "a store is scored for students of kind causal_lm or image_text, and student.kind is "
                f"{kind_of(recipe.student)!r}"
            )
        self.reader = reader = recipe.student.reader(local_only=False)
        self.store.check_reader(reader)
        for known in self.store.prompt_ids:
            self.store.check_prompt(self.prompts[known], reader.encode(self.prompts[known]))
        self.teacher: LanguageTeacher | LiveServedTeacher
        if isinstance(settings, ServedTeacher):
            settings = settings.model_copy(update={"answers": kind, **({} if top_k is None else {"top_k": top_k})})
            self.teacher = LiveServedTeacher(settings, settings.reader(reader))
            language: InProcess = self.teacher.reader
            model = self.teacher.found.model
        else:
            made = settings.alone(context) if isinstance(settings, LocalTeacher) else settings.build(context, None)
            self.teacher = made
            language, model = made.language, settings.model
        self.settings: Scoring = settings
        self._check_agreement(recipe, reader, language, own)
        fixed = [self.store.header.covered()]
        fixed += [self.teacher.vocabulary] if self.teacher.vocabulary and not own else []
        common = common_vocabulary([reader] if own else [reader, language], fixed)
        self.context = context.with_(agreed=Tokens(common, tuple(self.store.header.end_ids) if own else ()))
        self.translated = TranslatedTeacher(self.teacher, language, reader) if own else None
        head: Head | None
        if isinstance(self.teacher, LiveServedTeacher):
            self.teacher.check_context(self._context_of_teacher())
            head = self.teacher.head.over(common) if self.teacher.head is not None else None
        else:
            theirs = tokens_of(self._context_of_teacher()).vocabulary
            head = self.teacher.language.head(context.temperature, theirs)
        identity = str(self.teacher.identity())
        most = (tokens_of(self.context).count or 0) - 1
        if kind == "top_k" and top_k is not None and top_k > most:
            raise IncompatibleError(
                f"--top-k is {top_k}, and student and teacher have {most + 1} ids in common; give {most} or less, or "
                "--kind exact, which keeps the answer at all of them"
            )
        header = TargetsHeader(
            kind="spans" if own else kind,
            top_k=(top_k or self._usual_top_k(most)) if kind == "top_k" else None,
            dtype=dtype if kind == "exact" else None,
            teacher={"model": model, "weights": identity},
            sees=settings.sees,
            tokenizer=language.tokenizer_hash if own else None,
            shown=settings.shown_hash,
            template=language.template_hash,
            processor=language.processor_hash,
            images=settings.images if isinstance(settings, ImageTextTeacher) else None,
            temperature=context.temperature,
            **VocabularyHeader.of(common),
            scale=1.0 if head is None else head.scale,
            softcap=None if head is None else head.softcap,
            versions=versions(),
        )
        name = name or f"{header.kind}-{re.sub(r'[^0-9A-Za-z.-]+', '-', identity.removeprefix('sha256:'))[:12]}"
        written = [self.prompts[i] for i in dict.fromkeys(self.store.prompt_ids)]
        views = self._views(written)
        for prompt, view in zip(written[: len(views)], views, strict=True):
            pictures_of(prompt, view)
        self.targets = Targets.create_or_continue(self.store, name, header)
        for warning in self.teacher.check_lengths(written, self.store.header.budget, "the teacher"):
            print(f"opd: {warning}", file=sys.stderr)
        self.unchecked = recipe.self_test
        if kind == "exact":
            assert head is not None
            with claim(self.targets.head_path) as mine:
                if mine:
                    self.targets.write_head(head)

    def _context_of_teacher(self) -> Context:
        return self.context if self.translated is None else self.translated.own_context(self.context)

    def _usual_top_k(self, most: int) -> int:
        return self.settings.top_k if isinstance(self.settings, ServedTeacher) else min(DEFAULT_TOP_K, most)

    def _check_agreement(self, recipe: Recipe, reader: InProcess, language: InProcess, own: bool) -> None:
        """Of the teacher with the student's side, what it reads with alone."""
        if reader.reads_pictures and not language.reads_pictures:
            raise IncompatibleError(
                "the teacher reads text alone, and the student pictures too: score with a teacher of kind image_text"
            )
        if reader.tokenizer_hash != self.store.header.tokenizer:
            raise IncompatibleError(f"{self.store.path} was made with another tokenizer than the recipe's student has")
        if own:
            return
        check_tokenizers(reader, language, "the teacher")
        theirs = end_ids(language)
        if recipe.end_tokens is None and theirs and not theirs & set(self.store.header.end_ids):
            raise IncompatibleError(
                f"the store's trajectories end with id {self.store.header.end_ids} and the teacher's with "
                f"{sorted(theirs)}; sample them with end_tokens={sorted(theirs)}"
            )

    @torch.no_grad()
    def score(self, shard: int) -> None:
        """Write the targets of one shard, unless they are there or another worker is at it."""
        with claim(self.targets.shard_path(shard)) as mine:
            if not mine:
                return
            rows = self.store.rows_of_shard(shard)
            ids = self.store.part(shard)[1]
            prompts = [self.prompts[name] for name in ids for _ in range(self.store.header.group)]
            trajectories = self.store.trajectories(rows, prompts, self.context.device, reader=self.reader)
            outside = tokens_of(self.context).vocabulary.outside(trajectories.actions).nonzero()
            if len(outside):
                row = int(torch.searchsorted(trajectories.lengths.cumsum(0), outside[0, 0].cpu(), right=True))
                raise DataError(
                    f"{self.store.name(rows[row])} holds a token that the teacher's vocabulary does not have"
                )
            with self.accelerator.autocast():
                if self.unchecked:
                    teacher = self.translated or self.teacher
                    teacher.check_outputs(trajectories.rows(0, min(2, len(trajectories)))[0], "the teacher")
                    self.unchecked = False
                (target,) = self._answer(trajectories)
            unread = unanswered(trajectories, [target])
            lost = int(unread.sum())
            if lost and (self.translated is None or self.teacher.failures()):
                raise RunError(
                    f"{lost} of {len(trajectories)} rows of a shard got no answer of the teacher "
                    f"({reasons([self.teacher])}): mend what failed and run opd score again, it goes on there"
                )
            left_out = None if self.translated is None else unread
            self.targets.write(shard, target.distribution, trajectories, self._views(prompts), left_out)

    def _views(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """The prompts as the teacher read them, where it reads pictures; none where it reads text alone."""
        if not isinstance(self.teacher, LanguageTeacher) or not self.teacher.language.reads_pictures:
            return []
        return [self.teacher.language.encode(*self.settings.view(prompt)) for prompt in prompts]

    def _answer(self, trajectories: Trajectories) -> list[Target]:
        if self.translated is not None:
            return self.translated.answer(trajectories, self.settings, self.context)
        if isinstance(self.teacher, LiveServedTeacher):
            assert isinstance(self.settings, ServedTeacher)
            return self.teacher.answer(trajectories, self.settings, self.context)
        return self.teacher.answer(trajectories, self.settings, self.context)


def chosen_teacher(recipe: Recipe, name: str | None) -> Scoring:
    """The one teacher of a recipe that scores; those of routes go by their tags."""
    teachers = [(t.name, t) for t in recipe.teacher if not isinstance(t, RoutedTeacher)]
    teachers += [pair for t in recipe.teacher if isinstance(t, RoutedTeacher) for pair in t.routes.items()]
    found = [t for known, t in teachers if name is None or known == name]
    if len(found) != 1:
        names = [known for known, _ in teachers if known]
        close = nearest(name, names) if name else ""
        raise RecipeError(f"the recipe has {len(teachers)} teachers; say which one scores: --teacher NAME{close}")
    if not isinstance(found[0], Scoring):
        raise RecipeError(
            f"teacher {found[0].model_dump()['kind']!r} is no frozen model; opd score takes kinds local, "
            "image_text and served"
        )
    return found[0]


def score(
    recipe: Recipe,
    path: Path,
    kind: Kind = "sampled",
    *,
    quiet: bool = False,
    **options: Unpack[ScoringOptions],
) -> Targets:
    """Score a store with a recipe's teacher in this process; `options` are those of `Scorer`."""
    with teacher_started(recipe, path, options.get("teacher"), quiet):
        scorer = Scorer(recipe, path, kind, **options)
        targets = scorer.targets
        work_through(targets.missing(), targets.store.header.shards, scorer.score, "scoring", quiet)
    tidy(targets.path)
    return targets


@contextmanager
def teacher_started(recipe: Recipe, path: Path, name: str | None, quiet: bool) -> Iterator[None]:
    """Around the scoring of a store: the server of the teacher that scores runs, where its settings start one."""
    teacher = chosen_teacher(recipe, name)
    store = Store.open(path).path
    with started(servers_of(teacher, store / FOLDER, "teacher"), Monitor(store, quiet=quiet).status):
        yield
