"""Held-out measurement of a policy that acts: episodes from fixed initial states, and what the teacher says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field

from opd.context import Context
from opd.distributions import Categorical
from opd.divergences import compare
from opd.policies.evaluation import Better, Evaluation
from opd.policies.held_out import (
    COUNTS,
    STREAM,
    HeldOut,
    Measured,
    Moment,
    accuracies,
    as_logged,
    by_prompt,
    first_answer,
    firsts,
    judge,
    outcomes,
    totals,
)
from opd.trajectories import Trajectories

TASK = "task"
"""Column by which successes are told apart."""

PLAYED = 12
"""Held-out episodes of one evaluation whose pictures logs keep."""

COMPARED = ("reverse_kl", "forward_kl", "top1_agreement", "student_entropy", "teacher_entropy")


class ActionEvaluation(Evaluation):
    """Held-out episodes, each from its row's own initial state: the same at every evaluation."""

    measures: ClassVar[Mapping[str, Better]] = {
        **Evaluation.measures,
        "forward_kl": "smaller",
        "top1_agreement": "larger",
        "steps": "smaller",
    }
    greedy: bool = Field(True, description="Act by the likeliest token; false draws as in training")
    frames: bool = Field(True, description="Keep pictures of the episodes for the report")


def wilson(successes: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of `count` trials, by default of 95 %."""
    if not count:
        return 0.0, 1.0
    share, square = successes / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z * (share * (1 - share) / count + square / (4 * count)) ** 0.5 / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


class Agent(Protocol):
    """A student that acts, as far as it is measured."""

    def __call__(self, trajectories: Trajectories, context: Context | None = None) -> Categorical: ...

    def rows(self, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]: ...


def measure(run: Measured, student: Agent, at: Moment) -> HeldOut:
    """Play `evaluation.k` episodes of every held-out row, and compare the student with the first teacher that can be
    asked there, at every token that was played.

    Metrics: `accuracy`, the success rate, with `accuracy_low` and `accuracy_high`, its Wilson interval of 95 %, and
    with k > 1 `pass_at_k`; `accuracy/TASK` by the rows' column `task` where it has several values; `steps`, environment
    steps of an episode; `reverse_kl`, `forward_kl`, `teacher_entropy` and `student_entropy` in nats a token and
    `top1_agreement`, without a teacher the student's entropy alone.
    """
    settings = at.settings
    prompts = run.share(run.held_out)
    tasks = sorted({str(p.fields[TASK]) for p in run.held_out if TASK in p.fields})
    tasks = tasks if len(tasks) > 1 else []
    sums: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    items: dict[str, dict[str, float]] = {}
    teacher = judge(run)
    if prompts:
        played = run.judged(at.sampler(prompts, settings.k, at.rollout.longest, stream=STREAM))
        sums |= outcomes(played)
        items["accuracy"] = by_prompt(played)
        sums["steps"] = float(sum(episode.steps for episode in played.contexts))
        for task in tasks:
            sums |= _of_task(played, task)
        shown = set(firsts(played))
        start = 0
        for micro, _ in played.split(run.micro):
            answer = None if teacher is None else first_answer(run, at, teacher, micro).distribution
            comparison = compare(student(micro, at.context), answer, micro.actions)
            learnt = micro.learnt.cpu()
            for name, value in comparison.sums(learnt).items():
                sums[name] = sums.get(name, 0.0) + value
            sums["compared"] = sums.get("compared", 0.0) + float(learnt.sum())
            kept = [i for i in range(len(micro)) if start + i in shown]
            start += len(micro)
            if kept:
                one, here = micro.pick(kept)
                values = {n: v[here] for n, v in comparison.values.items()}
                if "teacher" in comparison.tops:
                    # What the teacher would have done, as an id.
                    values["expert"] = comparison.tops["teacher"][0][here, 0]
                rows += as_logged(student.rows(one, values), one.prompts, run)
    for row in rows[PLAYED:]:
        row["episode"]["frames"] = []
    return HeldOut(_metrics(run, sums, tasks, settings.k), rows, {n: found for n, found in items.items() if found})


def _of_task(trajectories: Trajectories, task: str) -> dict[str, float]:
    """Sum and number of the outcomes of one task's episodes."""
    if trajectories.rewards is None:
        return {}
    mine = torch.tensor([str(p.fields.get(TASK)) == task for p in trajectories.prompts])
    known = trajectories.rewards[mine & ~trajectories.rewards.isnan()]
    return {f"accuracy/{task}": float(known.sum()), f"verified/{task}": float(len(known))}


def _metrics(run: Measured, sums: Mapping[str, float], tasks: Sequence[str], k: int) -> dict[str, float]:
    by_task = [f"{name}/{task}" for task in tasks for name in ("accuracy", "verified")]
    names = COMPARED if judge(run) is not None else ("student_entropy",)
    total = totals(run, sums, [*COUNTS, *names, "compared", "steps", *by_task])
    metrics = {name: total[name] / total["compared"] for name in names if total["compared"]}
    metrics["steps"] = total["steps"] / max(1.0, total["trajectories"])
    metrics |= accuracies(total, k)
    if total["verified"]:
        low, high = wilson(total["accuracy"], total["verified"])
        metrics |= {"accuracy_low": low, "accuracy_high": high}
    for task in tasks:
        if total[f"verified/{task}"]:
            metrics[f"accuracy/{task}"] = total[f"accuracy/{task}"] / total[f"verified/{task}"]
    return metrics
