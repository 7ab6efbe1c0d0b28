"""Both KLs, agreement and entropy of two distributions, position by position and without gradient: for monitors."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from opd.distributions import Categorical
from opd.divergences.operator import chunk_rows


@dataclass(frozen=True)
class Comparison:
    """float32 `[N]` each, detached, in nats. `log_p` and `log_q` are the log-probabilities of the actions taken."""

    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    top1_agreement: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    log_p: torch.Tensor
    log_q: torch.Tensor

    def means(self) -> dict[str, float]:
        """Token means, without the action log-probabilities."""
        names = [f.name for f in fields(self) if not f.name.startswith("log_")]
        return {name: float(getattr(self, name).double().mean()) for name in names}


@torch.no_grad()
def compare(student: Categorical, teacher: Categorical, actions: torch.Tensor) -> Comparison:
    """Compare two full distributions at N positions, a chunk at a time."""
    rows = chunk_rows(student.head.size)
    parts: dict[str, list[torch.Tensor]] = {f.name: [] for f in fields(Comparison)}
    for start in range(0, len(student), rows):
        chunk = slice(start, start + rows)
        log_q, log_p = student.select(chunk).log_probs(), teacher.select(chunk).log_probs()
        taken = actions[chunk, None]
        parts["log_q"].append(log_q.gather(1, taken).squeeze(1))
        parts["log_p"].append(log_p.gather(1, taken).squeeze(1))
        parts["top1_agreement"].append((log_q.argmax(-1) == log_p.argmax(-1)).float())
        q, p = log_q.exp(), log_p.exp()
        neg_h_q, neg_h_p = torch.linalg.vecdot(q, log_q), torch.linalg.vecdot(p, log_p)
        parts["student_entropy"].append(-neg_h_q)
        parts["teacher_entropy"].append(-neg_h_p)
        parts["reverse_kl"].append(neg_h_q - torch.linalg.vecdot(q, log_p))
        parts["forward_kl"].append(neg_h_p - torch.linalg.vecdot(p, log_q))
    empty = torch.zeros(0, device=student.hidden.device)
    return Comparison(**{name: torch.cat(part) if part else empty for name, part in parts.items()})
