"""Held-out measurement: the student's own rollouts on prompts that it never trains on, scored by its teachers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from opd.distributions import Categorical
from opd.divergences import Comparison, compare
from opd.divergences.statistics import MEANS
from opd.policies import Student
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.run import Run

ROW_VALUES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "log_q", "log_p")
"""What a held-out row keeps of each token."""

STREAM = -1
"""Random stream of held-out rollouts: the same draws at every evaluation of a run."""


@dataclass(frozen=True)
class HeldOut:
    """Metrics over all processes, and this process's rollouts token by token for samples and reports."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


@torch.no_grad()
def evaluate(run: Run) -> HeldOut:
    """Roll out every held-out prompt once and compare with the (first) teacher at every position.

    Metrics: `forward_kl`, `reverse_kl`, `student_entropy`, `teacher_entropy` in nats a token, `top1_agreement`,
    `length` in tokens, `truncated` share, and `accuracy` where a verifier gave verdicts.
    """
    recipe = run.recipe
    training = run.student.module.training
    run.student.module.eval()
    budget = recipe.evaluation.max_new_tokens or recipe.rollout.budget
    prompts = run.share(run.held_out)
    sums: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    if prompts:
        trajectories = run.verify(run.rollout(prompts, 1, budget, stream=STREAM))
        for micro, _ in trajectories.split(recipe.batch.micro):
            student, teacher = run.student(micro), run.teachers[0](micro)
            assert isinstance(student, Categorical)
            assert isinstance(teacher, Categorical)
            comparison = compare(student, teacher, micro.actions)
            for name, mean in comparison.means().items():
                sums[name] = sums.get(name, 0.0) + mean * micro.positions
            rows += _rows(run, micro, comparison)
        sums |= {
            "positions": trajectories.positions,
            "trajectories": len(trajectories),
            "truncated": float((~trajectories.finished).sum()),
        }
        if trajectories.rewards is not None:
            known = ~torch.isnan(trajectories.rewards)
            sums |= {"accuracy": float(trajectories.rewards[known].sum()), "verified": float(known.sum())}
    run.student.module.train(training)
    return HeldOut(_means(run, sums), rows)


def _means(run: Run, sums: dict[str, float]) -> dict[str, float]:
    names = [*MEANS, "positions", "trajectories", "truncated", "accuracy", "verified"]
    totals = run.sum_over_processes(torch.tensor([float(sums.get(n, 0.0)) for n in names], dtype=torch.float64))
    total = dict(zip(names, totals.tolist(), strict=True))
    metrics = {name: total[name] / total["positions"] for name in MEANS}
    metrics["length"] = total["positions"] / total["trajectories"]
    metrics["truncated"] = total["truncated"] / total["trajectories"]
    if total["verified"]:
        metrics["accuracy"] = total["accuracy"] / total["verified"]
    return metrics


def _rows(run: Run, micro: Trajectories, comparison: Comparison) -> list[dict[str, Any]]:
    values = {name: getattr(comparison, name) for name in ROW_VALUES}
    rows = token_rows(run.student, micro, values)
    start = 0
    for row in rows:
        here = slice(start, start + len(row["tokens"]))
        start = here.stop
        row["alternatives"] = {
            side: _alternatives(run.student, top[0][here], top[1][here])
            for side, top in (("student", comparison.student_top), ("teacher", comparison.teacher_top))
        }
    return rows


def token_rows(student: Student, micro: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """One row a trajectory, as samples.jsonl and rollouts.jsonl hold them: its text, its tokens, and `values` by token.

    A row has `id`, `prompt`, `completion`, `finished`, `reward` (or None), `tokens` (T texts), `values` (name to T
    numbers). Held-out rows add `alternatives` (`student` and `teacher`: for each token `[text, probability]` pairs).
    """
    rows = []
    start = 0
    for i, actions in enumerate(micro.completions()):
        here = slice(start, start + len(actions))
        start = here.stop
        reward = None if micro.rewards is None or bool(micro.rewards[i].isnan()) else float(micro.rewards[i])
        rows.append(
            {
                "id": micro.prompts[i].id,
                "prompt": micro.prompts[i].view(),
                "completion": student.decode(actions),
                "finished": bool(micro.finished[i]),
                "reward": reward,
                "tokens": student.tokens(actions),
                "values": {name: [round(v, 4) for v in value[here].tolist()] for name, value in values.items()},
            }
        )
    return rows


def _alternatives(student: Student, ids: torch.Tensor, probabilities: torch.Tensor) -> list[list[tuple[str, float]]]:
    """For each position its K most likely tokens and their probabilities."""
    texts = iter(student.tokens(ids.flatten()))
    return [[(next(texts), round(p, 4)) for p in row] for row in probabilities.tolist()]
