"""Both KLs, agreement and entropy of two distributions, position by position and without gradient: for monitors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd.distributions import Categorical, Distribution, Routed, Sampled, TopK, append_tail, spans_in
from opd.operator import chunk_rows

MEANS = ("forward_kl", "reverse_kl", "top1_agreement", "student_entropy", "teacher_entropy")
KNOWN = {
    "categorical": MEANS,
    "top_k": ("forward_kl_top_k", "reverse_kl_top_k", "top1_agreement", "student_entropy"),
    "sampled": ("reverse_kl_sampled", "student_entropy"),
    "aligned": ("reverse_kl_sampled", "student_entropy"),
    "spans": ("reverse_kl_sampled", "student_entropy"),
}
"""What can be measured against a teacher, by the kind of its answers."""

ALTERNATIVES = 4
"""K of the alternatives kept for each position."""


@dataclass(frozen=True)
class Comparison:
    """Position by position, detached.

    Attributes:
        values: float32 `[N]` each, in nats, by name: those of `KNOWN`, and the log-probabilities `log_p` (teacher,
            where it says that of all ids or of the actions) and `log_q` (student) of the actions taken. Without a
            teacher only `student_entropy` and `log_q`.
        tops: `student` and, where it says that, `teacher`: `[N, K]` ids and `[N, K]` probabilities, most likely first.
    """

    values: dict[str, torch.Tensor]
    tops: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def sums(self, counted: torch.Tensor) -> dict[str, float]:
        """Sums over the tokens that count (bool `[N]`) of the divergences, the agreement and the entropies; tokens of
        which nothing is known have the mean of the others."""
        return {
            name: _sum(value.double()[counted]) for name, value in self.values.items() if not name.startswith("log_")
        }


def _sum(values: torch.Tensor) -> float:
    known = values[~values.isnan()]
    if len(known) == len(values):
        return float(values.sum())
    return float(known.mean()) * len(values) if len(known) else 0.0


@torch.no_grad()
def compare(student: Categorical, teacher: Distribution | None, actions: torch.Tensor) -> Comparison:
    """Compare a full distribution with a teacher's at N positions, a chunk at a time; without a teacher look at the
    student alone.

    Of a teacher that answers `TopK` the divergences are those over its K ids and the bucket of all others, a lower
    bound of the whole ones; of one that answers `Sampled`, `reverse_kl_sampled` is `log q(a) - log p(a)` of the actions
    taken, whose mean over the student's own samples is the reverse KL. So it is of one of another tokenizer, with a
    span's shared out evenly over its tokens, and NaN outside of spans.
    """
    parts = teacher.parts if isinstance(teacher, Routed) else (teacher,)
    if teacher is not None and not all(isinstance(part, Categorical) for part in parts):
        return _compare_partly(student, teacher, actions)
    assert teacher is None or isinstance(teacher, Categorical | Routed)
    rows = chunk_rows(student.head.size)
    values: dict[str, list[torch.Tensor]] = {}
    tops: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for start in range(0, max(1, len(student)), rows):
        chunk = slice(start, start + rows)
        q, log_q = _look("student", "log_q", student.select(chunk), actions[chunk], values, tops)
        if teacher is None:
            continue
        p, log_p = _look("teacher", "log_p", teacher.select(chunk), actions[chunk], values, tops)
        same = tops["student"][-1][0][:, 0] == tops["teacher"][-1][0][:, 0]
        found = {
            "top1_agreement": same.float(),
            "reverse_kl": -values["student_entropy"][-1] - torch.linalg.vecdot(q, log_p),
            "forward_kl": -values["teacher_entropy"][-1] - torch.linalg.vecdot(p, log_q),
        }
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    return Comparison(
        {name: torch.cat(parts) for name, parts in values.items()},
        {side: (torch.cat([i for i, _ in found]), torch.cat([v for _, v in found])) for side, found in tops.items()},
    )


def _compare_partly(student: Categorical, teacher: Distribution, actions: torch.Tensor) -> Comparison:
    alone = compare(student, None, actions)
    spans = spans_in(teacher)
    if spans is not None:
        log_q = alone.values["log_q"]
        ratio = (spans.sums(log_q) - spans.sums(spans.log_probs.to(log_q))) / spans.sums(torch.ones_like(log_q))
        each = torch.full_like(log_q, torch.nan)
        each[spans.compared] = ratio[spans.owners()[spans.compared]]
        return Comparison(alone.values | {"reverse_kl_sampled": each}, alone.tops)
    values, rows = dict(alone.values), chunk_rows(student.head.size)
    for mine, piece in teacher.pieces():
        for start in range(0, len(piece), rows):
            here = mine[start : start + rows].to(actions.device)
            for name, found in _known(student.select(here), piece.select(slice(start, start + rows)), actions[here]):
                values.setdefault(name, torch.full_like(values["log_q"], torch.nan))[here] = found
    return Comparison(values, alone.tops)


@torch.no_grad()
def likeliest(one: Distribution, here: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The most likely ids `[P, K]` and their probabilities, float32 `[P, K]`, at the positions `here`, int64 `[P]` on
    the CPU, most likely first, with K at most `ALTERNATIVES`; None of a distribution that lists none."""
    parts = one.parts if isinstance(one, Routed) else (one,)
    if not len(here) or not all(isinstance(part, Categorical | TopK) for part in parts):
        return None
    chosen = one.select(here)
    pieces = list(chosen.pieces()) if isinstance(chosen, Routed) else [(torch.arange(len(here)), chosen)]
    places, tops = [mine.cpu() for mine, _ in pieces], [_top(piece) for _, piece in pieces]
    width = min(ids.shape[1] for ids, _ in tops)
    order = torch.cat(places).argsort()
    ids, probabilities = (torch.cat([top[i][:, :width].cpu() for top in tops])[order] for i in (0, 1))
    return ids, probabilities


def _top(one: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(one, TopK):
        best, places = one.log_probs.float().topk(min(ALTERNATIVES, one.ids.shape[1]), dim=-1)
        return one.ids.gather(1, places), best.exp()
    assert isinstance(one, Categorical)
    rows = chunk_rows(one.head.size)
    chunks = (one.select(slice(start, start + rows)) for start in range(0, len(one), rows))
    tops = [chunk.log_probs().topk(min(ALTERNATIVES, one.head.size), dim=-1) for chunk in chunks]
    return one.vocabulary.named(torch.cat([top.indices for top in tops])), torch.cat([t.values for t in tops]).exp()


def _known(student: Categorical, answer: Distribution, actions: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    log_q = student.log_probs()
    if isinstance(answer, Sampled):
        log_p = answer.log_probs.float()
        taken = log_q.gather(1, student.vocabulary.columns(actions)[:, None]).squeeze(1)
        return [("log_p", log_p), ("reverse_kl_sampled", taken - log_p)]
    assert isinstance(answer, TopK)
    p, q = answer.with_tail(), append_tail(log_q.gather(1, student.vocabulary.columns(answer.ids)))
    best = answer.ids.gather(1, answer.log_probs.argmax(1, keepdim=True)).squeeze(1)
    return [
        ("forward_kl_top_k", torch.linalg.vecdot(p.exp(), p - q)),
        ("reverse_kl_top_k", torch.linalg.vecdot(q.exp(), q - p)),
        ("top1_agreement", (student.vocabulary.named(log_q.argmax(1)) == best).float()),
    ]


def _look(
    side: str,
    log_name: str,
    one: Categorical | Routed,
    actions: torch.Tensor,
    values: dict[str, list[torch.Tensor]],
    tops: dict[str, list[tuple[torch.Tensor, torch.Tensor]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and log-probabilities of one side of a chunk, with what is known of it alone added."""
    log_probs = one.log_probs()
    probabilities = log_probs.exp()
    values.setdefault(log_name, []).append(log_probs.gather(1, one.vocabulary.columns(actions)[:, None]).squeeze(1))
    values.setdefault(f"{side}_entropy", []).append(-torch.linalg.vecdot(probabilities, log_probs))
    best, ids = probabilities.topk(min(ALTERNATIVES, probabilities.shape[-1]), dim=-1)
    tops.setdefault(side, []).append((one.vocabulary.named(ids), best))
    return probabilities, log_probs
