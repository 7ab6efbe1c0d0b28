"""A teacher with a tokenizer of its own: the student's completions are read again, in its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from opd.context import Context
from opd.distributions import (
    Aligned,
    Categorical,
    Common,
    Distribution,
    Head,
    Listed,
    Sampled,
    Spans,
    Target,
    Told,
    Vocabulary,
)
from opd.distributions.aligned import NEVER
from opd.distributions.spans import Span
from opd.errors import IncompatibleError
from opd.language.agreement import common_vocabulary, end_ids
from opd.language.alignment import Pair, Shares, shares, side_of
from opd.language.engines.in_process import InProcess, language_of
from opd.language.identity import PROBE
from opd.language.token_bytes import TokenBytes, token_bytes
from opd.language.tokens import Tokens, tokens_of
from opd.operator import chunk_rows
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.teachers.base import LiveTeacher, Teacher, unanswered
from opd.trajectories import Trajectories


@dataclass(frozen=True)
class Translation:
    """B trajectories in the teacher's tokens.

    Attributes:
        asked: those that the teacher is asked about, A of them, of M positions.
        of: the trajectory, 0 to B - 1, that each of the A is.
        spans: of each of the A.
        reasons: why each of the others cannot be read, by its number.
        sizes: int64 `[N]`, bytes of each of the student's tokens.
    """

    asked: Trajectories
    of: list[int]
    spans: list[list[Span]]
    reasons: dict[int, str]
    sizes: torch.Tensor


class TranslatedTeacher(LiveTeacher[Teacher]):
    """Reads a completion's text, not its ids: the bytes that the student wrote become the teacher's own tokens, behind
    the prompt under its own template, and the end of the student's turn the end of its own. What it says of its tokens
    belongs to spans, the pieces between positions at which both tokenizers have a boundary: where a span is one token
    on both sides a distribution over the tokens that both have, and everywhere the log-probability of what was drawn.

    Completions that do not survive this are asked about in vain, as those that a server does not answer.

    Args:
        inner: the same teacher, which answers in its own tokens.
        reader: what it reads with, perhaps without weights.
        student: what the student reads with, perhaps without weights.

    Raises:
        IncompatibleError: a tokenizer whose tokens have no text of their own.
    """

    translates = True

    def __init__(self, inner: LiveTeacher, reader: InProcess, student: InProcess):
        self.inner, self.own_reader, self.settings = inner, reader, inner.settings
        self.student = student
        self.answers: type[Distribution] = Spans if inner.answers is Sampled else Aligned
        self.everywhere = inner.everywhere
        self.remembers = inner.remembers
        self.texts = (
            token_bytes(self.student.tokenizer, self.student.owner),
            token_bytes(reader.tokenizer, reader.owner),
        )
        self.failed: Counter[str] = Counter()
        self._pair: tuple[Tokens, Pair] | None = None
        self._columns: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._head: tuple[torch.Tensor, Head] | None = None
        self._counts: dict[str, float] | None = None

    # -- what is asked before the run --------------------------------------------------------------------------------

    @property
    def notes(self) -> list[str]:
        told = [] if self._pair is None else [self._told(self._pair[1])]
        return [*self.inner.notes, *told]

    def _told(self, pair: Pair) -> str:
        ours, _ = pair.common
        return (
            f"{self.own_reader.owner} has a tokenizer of its own: {len(ours) - len(pair.control)} of the student's "
            f"{len(pair.student.ids)} tokens and of its {len(pair.teacher.ids)} are the same bytes"
        )

    def check_student(self, student: Student, context: Context) -> None:
        ours, _ = self.pair(context).common
        if not ours:
            raise IncompatibleError(f"{self.own_reader.owner} and the student have no token of the same bytes")
        self.inner.check_student(student, self.own_context(context))

    def common_ids(self, context: Context) -> int | None:
        return len(self.pair(context).common[0])

    def check_scorer(self, context: Context) -> None:
        raise IncompatibleError(
            f"{self.own_reader.owner} has a tokenizer of its own and reads whole texts, and rollout.watch asks it "
            "while they are written: take a teacher of the student's tokenizer, or leave out rollout.watch"
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        self.inner.check_prompts(prompts)

    def check_lengths(self, prompts: Sequence[Prompt], budget: int, which: str) -> list[str]:
        if self._pair is None:
            return self.inner.check_lengths(prompts, budget, which)
        # A completion is as long in the teacher's tokens as the prompts say of texts like it.
        pair, texts = self._pair[1], [text for p in prompts[:64] if isinstance(text := p.view(), str)]
        ratio = shares(pair, [*texts, PROBE]).tokens
        return self.inner.check_lengths(prompts, ceil(budget * max(1.0, ratio)), which)

    def check_outputs(self, trajectories: Trajectories, which: str) -> None:
        self.inner.check_outputs(self._probe(trajectories), which)

    def _probe(self, trajectories: Trajectories) -> Trajectories:
        """A known text behind the prompts: what a student wrote may be none."""
        ids = self.texts[1].encode(PROBE) or [next(iter(self.texts[1].of))]
        return self._asked(list(trajectories.prompts), [ids[: 8 + i] for i in range(len(trajectories))], encode=True)

    @property
    def leaves_out(self) -> bool:
        return not self.inner.failures()

    def prompt_length(self, prompt: Prompt) -> int | None:
        return self.inner.prompt_length(prompt)

    # -- at every step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: Teacher, context: Context) -> list[Target]:
        translation = self._translate(trajectories, context)
        targets = self.inner.answer(translation.asked, settings, self.own_context(context))
        share = translation.asked.positions / max(1, trajectories.positions)
        self.asked = self.inner.asked * share if translation.of else 0.0
        self._counts = None
        return [self._target(target, trajectories, translation, context) for target in targets]

    def prepare(self, prompts: Sequence[Prompt], context: Context) -> None:
        self.inner.prepare(prompts, self.own_context(context))

    @property
    def early(self) -> bool:  # type: ignore[override]
        return self.inner.early and self._pair is not None

    def expect(self, prompt: Prompt, actions: torch.Tensor) -> None:
        if self._pair is not None:
            reading = self._pair[1].read(actions.tolist())
            if not isinstance(reading, str) and reading.ids:
                self.inner.expect(prompt, torch.tensor(reading.ids))

    def close(self) -> None:
        self.inner.close()

    def failures(self) -> dict[str, int]:
        return {**self.inner.failures(), **self.failed}

    def identity(self) -> str | None:
        return self.inner.identity()

    def begin_step(self) -> None:
        self._counts = None
        self.inner.begin_step()

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`alignment/...` of the step's last answer: shares of the text's bytes in spans of one token on both sides
        (`single_bytes`), in spans of several (`span_bytes`) and without a counterpart (`uncompared_bytes`); of spans
        that are single (`single_spans`); of the teacher's probability at those that is on common tokens
        (`common_mass`); and of completions left out, since their text cannot be read (`left_out`)."""
        names = ("bytes", "single", "several", "spans", "single_spans", "mass", "places", "asked", "left_out")
        counts = self._counts or {}
        self._counts = None
        mine = torch.tensor([counts.get(name, 0.0) for name in names], dtype=torch.float64)
        total = dict(zip(names, sum_over_processes(mine).tolist(), strict=True))
        signals: dict[str, float] = {}
        if total["asked"]:
            signals["left_out"] = total["left_out"] / total["asked"]
        if total["bytes"]:
            signals["single_bytes"] = total["single"] / total["bytes"]
            signals["span_bytes"] = total["several"] / total["bytes"]
            signals["uncompared_bytes"] = 1 - signals["single_bytes"] - signals["span_bytes"]
        if total["spans"]:
            signals["single_spans"] = total["single_spans"] / total["spans"]
        if total["places"]:
            signals["common_mass"] = total["mass"] / total["places"]
        named = f"@{self.settings.name}" if self.settings.name else ""
        return {f"alignment/{name}{named}": value for name, value in signals.items()}

    # -- the two tokenizers ------------------------------------------------------------------------------------------

    def pair(self, context: Context) -> Pair:
        """Both tokenizers, over the ids that count in a run."""
        tokens = tokens_of(context)
        if self._pair is None or self._pair[0] != tokens:
            self._pair = (tokens, pair_of(self.student, self.own_reader, tokens, self.texts, self.inner.vocabulary))
            self._columns.clear()
            self._head = None
        return self._pair[1]

    def shares(self, texts: Sequence[str], context: Context) -> Shares:
        """How texts compare under both."""
        return shares(self.pair(context), texts)

    def own_context(self, context: Context) -> Context:
        """The run's facts in the teacher's ids."""
        teacher = self.pair(context).teacher
        return context.with_(agreed=Tokens(teacher.vocabulary, tuple(sorted(teacher.ends))))

    def _translate(self, trajectories: Trajectories, context: Context) -> Translation:
        pair = self.pair(context)
        of: list[int] = []
        ids: list[list[int]] = []
        spans: list[list[Span]] = []
        reasons: dict[int, str] = {}
        sizes: list[int] = []
        for i, actions in enumerate(trajectories.completions()):
            found = actions.tolist()
            sizes += [len(pair.student.texts.of.get(each, b"")) for each in found]
            reading = pair.read(found) if found else None
            if isinstance(reading, str):
                reasons[i] = reading
            elif reading is not None and reading.ids:
                of.append(i)
                ids.append(reading.ids)
                spans.append(reading.spans)
        self.failed.update(reasons.values())
        prompts = [trajectories.prompts[i] for i in of]
        if not of and len(trajectories):
            # Somebody has to say of which form answers are.
            prompts, ids = [trajectories.prompts[0]], [[next(iter(pair.teacher.ids.values()))]]
        asked = self._asked(prompts, ids)
        return Translation(asked, of, spans, reasons, torch.tensor(sizes, dtype=torch.int64))

    def _asked(self, prompts: list[Prompt], ids: Sequence[Sequence[int]], encode: bool = False) -> Trajectories:
        count = sum(map(len, ids))
        nothing = torch.zeros(0, dtype=torch.int64)
        contexts = [self.own_reader.encode(*self.settings.view(p)) if encode else nothing for p in prompts]
        return Trajectories(
            prompts=prompts,
            contexts=contexts,
            actions=torch.tensor([i for row in ids for i in row], dtype=torch.int64),
            lengths=torch.tensor([len(row) for row in ids], dtype=torch.int64),
            behaviour_log_probs=torch.zeros(count),
            finished=torch.ones(len(prompts), dtype=torch.bool),
            learn=torch.ones(count, dtype=torch.bool),
            authors=torch.zeros(count, dtype=torch.uint8),
            groups=torch.arange(len(prompts)),
        )

    # -- from the teacher's positions to the student's ---------------------------------------------------------------

    def _target(self, target: Target, trajectories: Trajectories, translation: Translation, context: Context) -> Target:
        home, count = context.device, trajectories.positions
        starts = (trajectories.lengths.cumsum(0) - trajectories.lengths).tolist()
        asked = translation.asked
        firsts = (asked.lengths.cumsum(0) - asked.lengths).tolist()
        begins, compared, single = (torch.zeros(count, dtype=torch.bool) for _ in range(3))
        opened: list[int] = []
        bounds: list[tuple[int, int]] = []
        places = torch.full((count,), -1, dtype=torch.int64)
        exact: list[int] = []
        lost = set(translation.reasons)
        unheard = unanswered(asked, [target]).tolist() if target.missing is not None else [False] * len(asked)
        for k, (i, spans) in enumerate(zip(translation.of, translation.spans, strict=True)):
            if unheard[k]:
                lost.add(i)
                continue
            for span in spans:
                start, stop, first = starts[i] + span.start, starts[i] + span.stop, firsts[k] + span.first
                begins[start], compared[start:stop], single[start:stop] = True, True, span.single
                opened.append(start)
                bounds.append((first, firsts[k] + span.last))
                if span.single:
                    places[start] = len(exact)
                    exact.append(first)
        index = torch.tensor(exact, dtype=torch.int64)
        taken, norms, mass = self._looked_at(target.distribution, asked.actions, index, context)
        # A span's log-probability is a difference of running sums, which float64 keeps as exact as its terms.
        running = torch.cat([torch.zeros(1, dtype=torch.float64), taken.double().cumsum(0)])
        edges = torch.tensor(bounds, dtype=torch.int64).reshape(-1, 2)
        log_probs = torch.zeros(count)
        log_probs[torch.tensor(opened, dtype=torch.int64)] = (running[edges[:, 1]] - running[edges[:, 0]]).float()
        spans_ = Spans(*(each.to(home) for each in (log_probs, begins, compared, single)))
        self._count(translation, trajectories, spans_, mass)
        answer: Distribution = spans_
        if self.answers is Aligned:
            answer = Aligned(spans_, places.to(home), self._common(target.distribution, index, norms, context))
        missing = torch.tensor([i in lost for i in range(len(trajectories))], dtype=torch.bool)
        missing = missing.repeat_interleave(trajectories.lengths).to(home)
        return replace(target, distribution=answer, missing=missing if lost else None)

    def _looked_at(
        self, answer: Distribution, actions: torch.Tensor, exact: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Float32 on the CPU: `[M]` log-probabilities of the teacher's tokens, `[E]` logarithms of the sums over its
        ids at the positions `exact` (ascending), and `[E]` its probability there of common tokens."""
        if isinstance(answer, Sampled):
            return answer.log_probs.float().cpu(), torch.zeros(0), torch.zeros(0)
        if isinstance(answer, Told):
            listed = self._listed(answer, exact.to(answer.top.ids.device), context)
            return answer.drawn.log_probs.float().cpu(), torch.zeros(0), listed.log_probs.exp().sum(-1).cpu()
        assert isinstance(answer, Categorical)
        device = answer.hidden.device
        actions, theirs = actions.to(device), self._ids(context, device)[1]
        wanted = torch.zeros(len(answer), dtype=torch.bool, device=device)
        wanted[exact.to(device)] = True
        taken, norms, mass = [], [], []
        rows = chunk_rows(answer.head.size)
        for start in range(0, len(answer), rows):
            here = slice(start, start + rows)
            logits = answer.head.logits(answer.hidden[here])
            norm = logits.logsumexp(-1)
            taken.append(logits.gather(1, actions[here, None]).squeeze(1) - norm)
            chosen = wanted[here]
            norms.append(norm[chosen])
            mass.append((logits[chosen].index_select(1, theirs).logsumexp(-1) - norm[chosen]).exp())
        return torch.cat(taken).cpu(), torch.cat(norms).cpu(), torch.cat(mass).cpu()

    def _listed(self, answer: Told, exact: torch.Tensor, context: Context) -> Listed:
        """Of the teacher's likeliest ids those that are common tokens, as the student's columns."""
        top = answer.top.select(exact)
        ours, theirs = self._ids(context, top.ids.device)
        order = theirs.argsort()
        found = torch.searchsorted(theirs[order], top.ids.contiguous()).clamp(max=len(theirs) - 1)
        there = theirs[order][found] == top.ids
        columns = self.pair(context).student.vocabulary.columns(ours)[order][found]
        return Listed(top.log_probs.float().where(there, NEVER), columns.where(there, 0))

    def _common(
        self, answer: Distribution, exact: torch.Tensor, norms: torch.Tensor, context: Context
    ) -> Common | Listed:
        if isinstance(answer, Told):
            return self._listed(answer, exact.to(answer.top.ids.device), context)
        assert isinstance(answer, Categorical)
        home = context.device
        ours, theirs = self._ids(context, home)
        pair = self.pair(context)
        columns = pair.student.vocabulary.columns(ours)
        sides = ((pair.student.vocabulary, ours), (answer.vocabulary, theirs))
        widths = (self._width(pair.student.vocabulary), answer.head.size)
        complete = all(
            len(ids) == width - len(vocabulary.excluded) for (vocabulary, ids), width in zip(sides, widths, strict=True)
        )
        rows = answer.select(exact.to(answer.hidden.device))
        return Common(rows, self._gathered(answer.head, theirs), norms.to(home), columns, complete)

    def _width(self, vocabulary: Vocabulary) -> int:
        if vocabulary.size is not None or vocabulary.ids is not None:
            return vocabulary.width(0)
        return int(self.student.base.get_output_embeddings().weight.shape[0])

    def _gathered(self, head: Head, theirs: torch.Tensor) -> Head:
        """The head's rows of the common tokens: gathered once, since the teacher does not move."""
        if self._head is None or self._head[0].data_ptr() != head.weight.data_ptr():
            bias = None if head.bias is None else head.bias[theirs]
            gathered = Head(head.weight[theirs], bias, head.scale, head.softcap, head.temperature)
            self._head = (head.weight, gathered)
        return replace(self._head[1], temperature=head.temperature)

    def _ids(self, context: Context, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 `[K]` of the common tokens: the student's ids and the teacher's."""
        pair = self.pair(context)
        if device not in self._columns:
            ours, theirs = (torch.tensor(each, dtype=torch.int64, device=device) for each in pair.common)
            self._columns[device] = (ours, theirs)
        return self._columns[device]

    def _count(self, translation: Translation, trajectories: Trajectories, spans: Spans, mass: torch.Tensor) -> None:
        compared, single, begins = (each.cpu() for each in (spans.compared, spans.single, spans.begins))
        sizes = translation.sizes
        left = torch.tensor([i in translation.reasons for i in range(len(trajectories))], dtype=torch.bool)
        kept = ~left.repeat_interleave(trajectories.lengths)
        self._counts = {
            "bytes": float(sizes[kept].sum()),
            "single": float(sizes[single].sum()),
            "several": float(sizes[compared & ~single].sum()),
            "spans": float(begins.sum()),
            "single_spans": float((begins & single).sum()),
            "mass": float(mass.double().sum()),
            "places": float(len(mass)),
            "asked": float(len(trajectories)),
            "left_out": float(len(translation.reasons)),
        }


def pair_of(
    student: InProcess,
    teacher: InProcess,
    tokens: Tokens,
    texts: tuple[TokenBytes, TokenBytes] | None = None,
    fixed: Vocabulary | None = None,
) -> Pair:
    """A student's tokenizer and a teacher's, over the ids that count.

    Args:
        tokens: what the student's distributions are over, and what ends its completions.
        texts: of both, where they are at hand.
        fixed: the ids of a teacher whose weights are elsewhere.
    """
    known = texts or (token_bytes(student.tokenizer, student.owner), token_bytes(teacher.tokenizer, teacher.owner))
    vocabulary = fixed or Vocabulary(max(teacher.tokenizer.get_vocab().values()) + 1)
    theirs = common_vocabulary([teacher], [vocabulary])
    return Pair(
        side_of(student, tokens.end_ids, tokens.vocabulary, known[0]),
        side_of(teacher, tuple(end_ids(teacher)), theirs, known[1]),
    )


def translated(inner: LiveTeacher, reader: InProcess, student: Student | None) -> TranslatedTeacher:
    """The teacher `inner` for a student of another tokenizer; `reader` is what it reads with.

    Raises:
        IncompatibleError: there is no student whose texts it would read.
    """
    if student is None:
        raise IncompatibleError(
            f"{reader.owner} has tokenizer: own, which reads the texts of a student, and there is none here: take a "
            "teacher of the student's tokenizer"
        )
    return TranslatedTeacher(inner, reader, language_of(student, "the student"))
