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
    by_task,
    first_answer,
    firsts,
    judge,
    outcomes,
    success_rates,
    tasks_of,
    totals,
)
from opd.trajectories import Trajectories

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
    tasks = tasks_of(run.held_out)
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
            sums |= by_task(played, task)
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


def _metrics(run: Measured, sums: Mapping[str, float], tasks: Sequence[str], k: int) -> dict[str, float]:
    of_tasks = [f"{name}/{task}" for task in tasks for name in ("accuracy", "verified")]
    names = COMPARED if judge(run) is not None else ("student_entropy",)
    total = totals(run, sums, [*COUNTS, *names, "compared", "steps", *of_tasks])
    metrics = {name: total[name] / total["compared"] for name in names if total["compared"]}
    metrics["steps"] = total["steps"] / max(1.0, total["trajectories"])
    return metrics | accuracies(total, k) | success_rates(total, tasks)
