"""Scenes of two tokenizers: every sequence of a few of the student's tokens, and its text as the teacher reads it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd.distributions import Aligned, Categorical, Common, Head, Spans, Target
from opd.distributions.spans import Span, spans_of
from opd.operator import Comparison, divergence_loss
from opd.scenes.base import Scene
from opd.scenes.sequences import Promise

STUDENT = ("a", "b", "c", "ab")
TEACHER = ("a", "b", "c", "bc", "abc")
LENGTH = 3
COMMON = tuple((STUDENT.index(piece), TEACHER.index(piece)) for piece in STUDENT if piece in TEACHER)


def read(text: str) -> list[int]:
    """A text in the teacher's tokens: at each place the longest that fits, as merges do."""
    order = sorted(range(len(TEACHER)), key=lambda i: -len(TEACHER[i]))
    ids: list[int] = []
    at = 0
    while at < len(text):
        ids.append(next(i for i in order if text.startswith(TEACHER[i], at)))
        at += len(TEACHER[ids[-1]])
    return ids


@dataclass(frozen=True)
class TokenisedScene(Scene):
    """Y = V ** L sequences of the student's tokens. Student and teacher are tables, one row of logits for every
    beginning, the teacher's in its own tokens.

    Attributes:
        student: float64 logits `[P, V]`, by the student's beginning.
        teacher: float64 logits `[P', V']`, by the teacher's.
        actions, states: int64 `[Y, L]`, every sequence, and the row before each action.
        readings: of each sequence the teacher's `(ids, rows)`.
        spans: of each sequence.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    actions: torch.Tensor
    states: torch.Tensor
    readings: Sequence[tuple[list[int], list[int]]]
    spans: Sequence[Sequence[Span]]

    @classmethod
    def random(cls, seed: int) -> TokenisedScene:
        """Opinions of moderate strength."""
        sequences = list(itertools.product(range(len(STUDENT)), repeat=LENGTH))
        mine = {p: i for i, p in enumerate(dict.fromkeys(y[:t] for y in sequences for t in range(LENGTH)))}
        ids = [read("".join(STUDENT[a] for a in y)) for y in sequences]
        theirs = {p: i for i, p in enumerate(dict.fromkeys(tuple(x[:t]) for x in ids for t in range(len(x))))}
        g = torch.Generator().manual_seed(seed)
        student = torch.randn(len(mine), len(STUDENT), generator=g, dtype=torch.float64)
        teacher = torch.randn(len(theirs), len(TEACHER), generator=g, dtype=torch.float64)
        return cls(
            student,
            1.5 * teacher,
            torch.tensor(sequences),
            torch.tensor([[mine[y[:t]] for t in range(LENGTH)] for y in sequences]),
            [(x, [theirs[tuple(x[:t])] for t in range(len(x))]) for x in ids],
            [
                spans_of([len(STUDENT[a]) for a in y], [len(TEACHER[i]) for i in x])
                for y, x in zip(sequences, ids, strict=True)
            ],
        )

    def law(self) -> torch.Tensor:
        return torch.log_softmax(self.student, -1)[self.states, self.actions].sum(-1).exp()

    def answer(self) -> Aligned:
        """What a teacher of another tokenizer says at the positions of all sequences."""
        count = self.actions.numel()
        log_p = torch.log_softmax(self.teacher, -1)
        log_probs = torch.zeros(count)
        begins, single = torch.zeros(2, count, dtype=torch.bool)
        places = torch.full((count,), -1, dtype=torch.int64)
        rows: list[int] = []
        for y, ((ids, states), spans) in enumerate(zip(self.readings, self.spans, strict=True)):
            for span in spans:
                start = y * LENGTH + span.start
                begins[start], single[start : y * LENGTH + span.stop] = True, span.single
                log_probs[start] = sum(float(log_p[states[n], ids[n]]) for n in range(span.first, span.last))
                if span.single:
                    places[start] = len(rows)
                    rows.append(states[span.first])
        ours, theirs = (list(each) for each in zip(*COMMON, strict=True))
        table = self.teacher.float().T.contiguous()
        hidden = torch.eye(len(self.teacher))[rows]
        norm = self.teacher[rows].logsumexp(-1).float()
        common = Common(Categorical(hidden, Head(table)), Head(table[theirs]), norm, torch.tensor(ours), False)
        return Aligned(Spans(log_probs, begins, torch.ones(count, dtype=torch.bool), single), places, common)

    def gradients(self, divergence: Comparison) -> torch.Tensor:
        """float64 `[Y, P, V]`, through the operator that training uses."""
        table = self.student.float().T.contiguous().requires_grad_()
        loss = divergence_loss(
            divergence,
            Categorical(torch.eye(len(self.student))[self.states.flatten()], Head(table)),
            [Target(self.answer())],
            torch.ones(self.actions.numel()),
            self.actions.flatten(),
            torch.full((len(self.actions),), LENGTH),
            per_example=True,
        )
        assert loss.per_example is not None
        rows = [torch.autograd.grad(value, table, retain_graph=True)[0] for value in loss.per_example]
        return torch.stack(rows).transpose(1, 2).double()

    def promised(self, divergence: Promise) -> torch.Tensor:
        """float64 `[P, V]`. Of a whole sequence: the divergence between the student's sequences and what the teacher
        says of their texts in its own tokens. Else, summed over the states that are one token on both sides, that of
        the distributions over common tokens and the rest."""
        z = self.student.clone().requires_grad_()
        log_q = torch.log_softmax(z, -1)
        log_p = torch.log_softmax(self.teacher, -1)
        if divergence.sequence_level:
            whole_q = log_q[self.states, self.actions].sum(-1)
            whole_p = torch.stack([log_p[states, ids].sum() for ids, states in self.readings])
            return torch.autograd.grad(divergence.exact(whole_p, whole_q), z)[0]
        ours, theirs = (list(each) for each in zip(*COMMON, strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for weight, mine, (_, states), spans in zip(self.law(), self.states, self.readings, self.spans, strict=True):
            for span in spans:
                if span.single:
                    p, q = log_p[states[span.first]], log_q[mine[span.start]]
                    total = total + weight * divergence.exact(
                        *(_in_buckets(*each) for each in ((p, theirs), (q, ours)))
                    )
        return torch.autograd.grad(total, z)[0]

    def kls(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of common tokens and the rest, at states that are one token on both sides."""
        return self.promised(_Exact(forward=True)), self.promised(_Exact(forward=False))


def _in_buckets(log_probs: torch.Tensor, ids: list[int]) -> torch.Tensor:
    near = log_probs[..., ids]
    return torch.cat([near, torch.log1p(-near.exp().sum(-1, keepdim=True))], -1)


@dataclass(frozen=True)
class _Exact:
    """A KL by the textbook."""

    forward: bool
    sequence_level: bool = False

    def exact(self, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        first, second = (log_p, log_q) if self.forward else (log_q, log_p)
        return (first.exp() * (first - second)).sum(-1)
