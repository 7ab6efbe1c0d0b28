"""Held-out measurement of a flow model: the images of its deterministic sampler, and its divergence by step."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from opd.distributions import Gaussian
from opd.flow.denoising import digits, labels
from opd.flow.rollout import GridSettings
from opd.policies.base import Student
from opd.policies.evaluation import Evaluation
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
"""Column by which accuracies are told apart."""


class FlowEvaluation(Evaluation):
    """Held-out images of the deterministic sampler."""

    steps: int = Field(40, ge=1, description="Of the deterministic sampler")


def measure(run: Measured, student: Student, at: Moment) -> HeldOut:
    """Draw `evaluation.k` images of every held-out prompt by `evaluation.steps` steps of the ODE, from noise that is
    the same at each evaluation; and one trajectory of the rollout's SDE, to compare the student with the first teacher
    that can be asked there.

    Metrics: `reverse_kl`, the mean over steps of the divergence of the next latent (mean over its numbers; with equal
    standard deviations it is the forward KL too), and `reverse_kl/step_K` of each step; where a verifier gave scores
    those of `accuracies`, and `accuracy/TASK` by the prompts' column `task` where it has several values.
    """
    settings = at.settings
    prompts = run.share(run.held_out)
    walker = run.rollout.held_out(at.rollout, at.context, student)
    assert isinstance(walker.settings, GridSettings)
    steps = walker.settings.trained_steps
    tasks = sorted({str(p.fields[TASK]) for p in run.held_out if TASK in p.fields})
    tasks = tasks if len(tasks) > 1 else []
    sums: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    items: dict[str, dict[str, float]] = {}
    teacher = judge(run)
    if prompts:
        drawn = run.judged(at.sampler(prompts, settings.k, 1, stream=STREAM))
        sums |= outcomes(drawn)
        items["accuracy"] = by_prompt(drawn)
        for task in tasks:
            sums |= _of_task(drawn, task)
        for i in firsts(drawn):
            one, _ = drawn.rows(i, i + 1)
            rows += as_logged(student.rows(one, {}), one.prompts, run)
        if teacher is not None:
            walked = walker(prompts, 1, steps, stream=STREAM)
            start = 0
            for micro, _ in walked.split(run.micro):
                answer = first_answer(run, at, teacher, micro).distribution
                assert isinstance(answer, Gaussian)
                own = student(micro, at.context)
                assert isinstance(own, Gaussian)
                kl = own.kl(answer)
                for k, value in enumerate(kl.view(-1, steps).double().sum(0).tolist()):
                    sums[f"step_{k}"] = sums.get(f"step_{k}", 0.0) + value
                sums["walked"] = sums.get("walked", 0.0) + len(micro)
                for context, value in zip(micro.contexts, kl.split(steps), strict=True):
                    rows[start] |= {"tokens": labels(context), "values": {"reverse_kl": digits(value)}}
                    start += 1
    metrics = _metrics(run, sums, tasks, steps if teacher is not None else 0, settings.k)
    return HeldOut(metrics, rows, {name: values for name, values in items.items() if values})


def _of_task(trajectories: Trajectories, task: str) -> dict[str, float]:
    """Sum and number of the scores of one task's trajectories."""
    if trajectories.rewards is None:
        return {}
    mine = torch.tensor([str(p.fields.get(TASK)) == task for p in trajectories.prompts])
    known = trajectories.rewards[mine & ~trajectories.rewards.isnan()]
    return {f"accuracy/{task}": float(known.sum()), f"verified/{task}": float(len(known))}


def _metrics(run: Measured, sums: dict[str, float], tasks: list[str], steps: int, k: int) -> dict[str, float]:
    by_step = [f"step_{step}" for step in range(steps)]
    by_task = [f"{name}/{task}" for task in tasks for name in ("accuracy", "verified")]
    total = totals(run, sums, [*COUNTS, *by_step, "walked", *by_task])
    metrics: dict[str, float] = {}
    if steps:
        metrics["reverse_kl"] = sum(total[name] for name in by_step) / (steps * total["walked"])
    metrics |= accuracies(total, k)
    for task in tasks:
        if total[f"verified/{task}"]:
            metrics[f"accuracy/{task}"] = total[f"accuracy/{task}"] / total[f"verified/{task}"]
    return metrics | {f"reverse_kl/{name}": total[name] / total["walked"] for name in by_step}
