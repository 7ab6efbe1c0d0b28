"""Held-out measurement: the student's own rollouts on prompts that it never trains on, scored by its teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from opd.distributions import Categorical, Routed
from opd.divergences import Comparison, compare
from opd.divergences.statistics import MEANS
from opd.policies import Student
from opd.prompts import Prompt
from opd.rollouts import PrefixSource
from opd.sharding import whole
from opd.teachers import LiveTeacher
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.run import Run

ROW_VALUES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "log_q", "log_p")
"""What a held-out row keeps of each token."""

STREAM = -1
"""Random stream of held-out rollouts: the same draws at every evaluation of a run."""


@dataclass(frozen=True)
class HeldOut:
    """Metrics over all processes; this process's rollouts token by token for samples and reports; and `items`, the
    values of `accuracy` and `greedy_accuracy` for each of its prompts by id, where a verifier gave verdicts."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    items: dict[str, dict[str, float]]


@torch.no_grad()
def evaluate(run: Run) -> HeldOut:
    """Roll out every held-out prompt and compare the student with the first teacher that can be asked there, at every
    position; where that one is routed, with each prompt's own.

    Metrics: `forward_kl`, `reverse_kl`, `student_entropy`, `teacher_entropy` in nats a token, `top1_agreement` (means
    over all tokens; without a teacher the student's entropy alone), `length` in tokens, `truncated` share; where
    training reads a store that holds an earlier student's completions of these prompts, `drift` and `drift_std` of
    `q(a) / q_then(a)` over their tokens; where a
    verifier gave verdicts `accuracy` (Avg@k: the mean over prompts and samples) and with k > 1 `pass_at_k` (share of
    prompts with a right answer among k); with `greedy` also `greedy_accuracy` and `greedy_length`.
    """
    with whole(run.student.module):
        return _evaluate(run)


def _evaluate(run: Run) -> HeldOut:
    settings = run.recipe.evaluation
    training = run.student.module.training
    run.student.module.eval()
    prompts = run.share(run.held_out)
    sums: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    items: dict[str, dict[str, float]] = {}
    if prompts:
        trajectories = roll_out(run, run.sampler, prompts, settings.k)
        sums |= _outcomes(trajectories, settings.k)
        items["accuracy"] = _by_prompt(trajectories, settings.k)
        judge = _judge(run)
        for micro, _ in trajectories.split(run.micro):
            student = run.student(micro)
            teacher = judge(micro) if judge is not None else None
            assert isinstance(student, Categorical)
            assert teacher is None or isinstance(teacher, Categorical | Routed)
            comparison = compare(student, teacher, micro.actions)
            for name, value in comparison.sums().items():
                sums[name] = sums.get(name, 0.0) + value
            rows += _rows(run, micro, comparison)
        before = run.rollout.written_before(prompts, run.recipe.rollout.budget)
        if before is not None:
            sums |= _moved(run, before)
        if settings.greedy:
            greedy = roll_out(run, run.sampler.drawing(None, 1.0, 1), prompts, 1)
            sums |= {f"greedy_{name}": value for name, value in _outcomes(greedy, 1).items()}
            items["greedy_accuracy"] = _by_prompt(greedy, 1)
    run.student.module.train(training)
    # The rows of a group share an id; the first sample of a prompt stands for it in reports.
    return HeldOut(_means(run, sums), rows[:: settings.k], {name: values for name, values in items.items() if values})


def roll_out(run: Run, sampler: PrefixSource, prompts: list[Prompt], k: int) -> Trajectories:
    """`k` completions of each held-out prompt, with verdicts."""
    budget = run.recipe.evaluation.max_new_tokens or run.recipe.rollout.budget
    return run.verify(sampler(prompts, k, budget, stream=STREAM))


def _judge(run: Run) -> LiveTeacher | None:
    """The first teacher that can be asked at new states."""
    return next((teacher for teacher in run.teachers if teacher.everywhere), None)


def _moved(run: Run, before: Trajectories) -> dict[str, float]:
    """Sums over the tokens that an earlier student wrote of `q(a) / q_then(a)` and its square."""
    sums = dict.fromkeys(MOVED, 0.0)
    for micro, _ in before.split(run.recipe.batch.micro):
        student = run.student(micro)
        assert isinstance(student, Categorical)
        ratio = (compare(student, None, micro.actions).values["log_q"] - micro.behaviour_log_probs).exp().double()
        for name, value in zip(MOVED, (ratio, ratio**2, torch.ones_like(ratio)), strict=True):
            sums[name] += float(value.sum())
    return sums


def _by_prompt(trajectories: Trajectories, k: int) -> dict[str, float]:
    """Mean verdict of each prompt that has one, by the prompt's id."""
    if trajectories.rewards is None:
        return {}
    means = trajectories.rewards.view(-1, k).nanmean(1).tolist()
    ids = [prompt.id for prompt in trajectories.prompts[::k]]
    return {name: mean for name, mean in zip(ids, means, strict=True) if mean == mean}


def _outcomes(trajectories: Trajectories, k: int) -> dict[str, float]:
    """Sums over this process's trajectories."""
    sums = {
        "positions": float(trajectories.positions),
        "trajectories": float(len(trajectories)),
        "truncated": float((~trajectories.finished).sum()),
    }
    if trajectories.rewards is not None:
        verdicts = trajectories.rewards.view(-1, k)
        known = ~verdicts.isnan()
        sums |= {
            "accuracy": float(verdicts[known].sum()),
            "verified": float(known.sum()),
            "passed": float((verdicts.nan_to_num() >= 1).any(1).sum()),
            "prompts": float(known.any(1).sum()),
        }
    return sums


MOVED = ("moved", "moved_squared", "moved_positions")
COUNTS = ("positions", "trajectories", "truncated", "accuracy", "verified", "passed", "prompts")


def _means(run: Run, sums: dict[str, float]) -> dict[str, float]:
    names = [*MEANS, *COUNTS, *MOVED, *(f"greedy_{name}" for name in COUNTS)]
    totals = run.sum_over_processes(torch.tensor([float(sums.get(n, 0.0)) for n in names], dtype=torch.float64))
    total = dict(zip(names, totals.tolist(), strict=True))
    known = MEANS if _judge(run) is not None else ("student_entropy",)
    metrics = {name: total[name] / total["positions"] for name in known}
    metrics["length"] = total["positions"] / total["trajectories"]
    metrics["truncated"] = total["truncated"] / total["trajectories"]
    if total["verified"]:
        metrics["accuracy"] = total["accuracy"] / total["verified"]
        if run.recipe.evaluation.k > 1:
            metrics["pass_at_k"] = total["passed"] / total["prompts"]
    if total["moved_positions"]:
        metrics["drift"] = total["moved"] / total["moved_positions"]
        square = total["moved_squared"] / total["moved_positions"]
        metrics["drift_std"] = max(0.0, square - metrics["drift"] ** 2) ** 0.5
    if total["greedy_trajectories"]:
        metrics["greedy_length"] = total["greedy_positions"] / total["greedy_trajectories"]
        if total["greedy_verified"]:
            metrics["greedy_accuracy"] = total["greedy_accuracy"] / total["greedy_verified"]
    return metrics


def _rows(run: Run, micro: Trajectories, comparison: Comparison) -> list[dict[str, Any]]:
    values = {name: comparison.values[name] for name in ROW_VALUES if name in comparison.values}
    rows = token_rows(run.student, run.teachers, micro, values)
    start = 0
    for row in rows:
        here = slice(start, start + len(row["tokens"]))
        start = here.stop
        row["alternatives"] = {
            side: _alternatives(run.student, top[0][here], top[1][here]) for side, top in comparison.tops.items()
        }
    return rows


def token_rows(
    student: Student, teachers: Sequence[LiveTeacher], micro: Trajectories, values: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """One row a trajectory, as samples.jsonl and rollouts.jsonl hold them: its text, its tokens, and `values` by token.

    A row has `id`, `prompt`, `completion`, `finished`, `reward` (or None), `tokens` (T texts), `values` (name to T
    numbers), and where a teacher is routed `teacher`, the route that answered. Held-out rows add `alternatives`
    (`student` and `teacher`: for each token `[text, probability]` pairs).
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
        routes = [route for teacher in teachers if (route := teacher.route(micro.prompts[i])) is not None]
        if routes:
            rows[-1]["teacher"] = ", ".join(routes)
    return rows


def _alternatives(student: Student, ids: torch.Tensor, probabilities: torch.Tensor) -> list[list[tuple[str, float]]]:
    """For each position its K most likely tokens and their probabilities."""
    texts = iter(student.tokens(ids.flatten()))
    return [[(next(texts), round(p, 4)) for p in row] for row in probabilities.tolist()]
