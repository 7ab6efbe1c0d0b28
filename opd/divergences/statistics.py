"""Both KLs, agreement and entropy of two distributions, position by position and without gradient: for monitors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd.distributions import Categorical, Routed
from opd.divergences.operator import chunk_rows

MEANS = ("forward_kl", "reverse_kl", "top1_agreement", "student_entropy", "teacher_entropy")
ALTERNATIVES = 4
"""K of the alternatives kept for each position."""


@dataclass(frozen=True)
class Comparison:
    """Position by position, detached.

    Attributes:
        values: float32 `[N]` each, in nats, by name: those of `MEANS`, and the log-probabilities `log_p` (teacher) and
            `log_q` (student) of the actions taken. Without a teacher only `student_entropy` and `log_q`.
        tops: `student` and `teacher`: `[N, K]` ids and `[N, K]` probabilities, most likely first.
    """

    values: dict[str, torch.Tensor]
    tops: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def sums(self) -> dict[str, float]:
        """Sums over the tokens of the divergences, the agreement and the entropies."""
        return {name: float(self.values[name].double().sum()) for name in MEANS if name in self.values}


@torch.no_grad()
def compare(student: Categorical, teacher: Categorical | Routed | None, actions: torch.Tensor) -> Comparison:
    """Compare two full distributions at N positions, a chunk at a time; without a teacher look at the student alone."""
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
    values.setdefault(log_name, []).append(log_probs.gather(1, actions[:, None]).squeeze(1))
    values.setdefault(f"{side}_entropy", []).append(-torch.linalg.vecdot(probabilities, log_probs))
    best, ids = probabilities.topk(min(ALTERNATIVES, probabilities.shape[-1]), dim=-1)
    tops.setdefault(side, []).append((ids, best))
    return probabilities, log_probs
