"""Both KLs, agreement and entropy of two distributions, position by position and without gradient: for monitors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd.distributions import Categorical
from opd.divergences.operator import chunk_rows

MEANS = ("forward_kl", "reverse_kl", "top1_agreement", "student_entropy", "teacher_entropy")
ALTERNATIVES = 4
"""K of the alternatives kept for each position."""


@dataclass(frozen=True)
class Comparison:
    """float32 `[N]` each, detached, in nats. `log_p` and `log_q` are the log-probabilities of the actions taken;
    `student_top` and `teacher_top` are `[N, K]` ids and `[N, K]` probabilities, most likely first."""

    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    top1_agreement: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor
    student_top: tuple[torch.Tensor, torch.Tensor]
    teacher_top: tuple[torch.Tensor, torch.Tensor]

    def means(self) -> dict[str, float]:
        """Token means of the divergences, the agreement and the entropies."""
        return {name: float(getattr(self, name).double().mean()) for name in MEANS}


@torch.no_grad()
def compare(student: Categorical, teacher: Categorical, actions: torch.Tensor) -> Comparison:
    """Compare two full distributions at N positions, a chunk at a time."""
    rows = chunk_rows(student.head.size)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in (*MEANS, "log_p", "log_q")}
    tops: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"student": [], "teacher": []}
    for start in range(0, len(student), rows):
        chunk = slice(start, start + rows)
        log_q, log_p = student.select(chunk).log_probs(), teacher.select(chunk).log_probs()
        taken = actions[chunk, None]
        parts["log_q"].append(log_q.gather(1, taken).squeeze(1))
        parts["log_p"].append(log_p.gather(1, taken).squeeze(1))
        q, p = log_q.exp(), log_p.exp()
        for side, probabilities in (("student", q), ("teacher", p)):
            best, ids = probabilities.topk(min(ALTERNATIVES, probabilities.shape[-1]), dim=-1)
            tops[side].append((ids, best))
        parts["top1_agreement"].append((tops["student"][-1][0][:, 0] == tops["teacher"][-1][0][:, 0]).float())
        neg_h_q, neg_h_p = torch.linalg.vecdot(q, log_q), torch.linalg.vecdot(p, log_p)
        parts["student_entropy"].append(-neg_h_q)
        parts["teacher_entropy"].append(-neg_h_p)
        parts["reverse_kl"].append(neg_h_q - torch.linalg.vecdot(q, log_p))
        parts["forward_kl"].append(neg_h_p - torch.linalg.vecdot(p, log_q))
    empty = torch.zeros(0, device=student.hidden.device)
    joined = {name: torch.cat(part) if part else empty for name, part in parts.items()}
    top = {
        f"{side}_top": (torch.cat([ids for ids, _ in found]), torch.cat([v for _, v in found]))
        if found
        else (empty.long()[:, None], empty[:, None])
        for side, found in tops.items()
    }
    return Comparison(**joined, **top)  # type: ignore[arg-type]
