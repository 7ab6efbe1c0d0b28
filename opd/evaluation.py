"""Held-out measurement: what a student makes of prompts that it never trains on. How, is its policy's business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from opd.prompts import Prompt
from opd.rollouts import PrefixSource
from opd.rollouts.base import Combination
from opd.sharding import whole
from opd.teachers import LiveTeacher
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.run import Run

STREAM = -1
"""Random stream of held-out rollouts: the same draws at every evaluation of a run."""

COUNTS = ("positions", "trajectories", "truncated", "accuracy", "verified", "passed", "prompts")
"""Names of the sums that `outcomes` makes."""


@dataclass(frozen=True)
class HeldOut:
    """Metrics over all processes; this process's rollouts position by position for samples and reports; and `items`,
    the values of `accuracy` and `greedy_accuracy` for each of its prompts by id, where a verifier gave verdicts."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    items: dict[str, dict[str, float]]


@torch.no_grad()
def evaluate(run: Run) -> HeldOut:
    """What the student's policy measures on the held-out prompts; in eval mode, without gradients, and with averaged
    weights where the update keeps any."""
    training = run.student.module.training
    run.student.module.eval()
    with run.optimiser.averaged(), whole(run.student.module):
        found = run.student.measure(run)
    run.student.module.train(training)
    return found


def roll_out(run: Run, sampler: PrefixSource, prompts: list[Prompt], k: int) -> Trajectories:
    """`k` trajectories of each held-out prompt, with verdicts; unless the recipe says how long, as long as the student
    writes in training, or where it does not write, as long as others do."""
    own = max(_bounds_of_student(run.rollout), default=run.rollout.settings.budget)
    budget = run.recipe.evaluation.max_new_tokens or own
    return run.verify(sampler(prompts, k, budget, stream=STREAM))


def _bounds_of_student(source: PrefixSource) -> list[int]:
    """Most actions of each source in this one that draws from the student as it is now."""
    if isinstance(source, Combination):
        return [bound for part in source.sources for bound in _bounds_of_student(part)]
    return [source.settings.budget] if source.current and source.authors == {"student"} else []


def rows_of(run: Run, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The student's rows of trajectories, and where a teacher is routed `teacher`, the route that answered."""
    rows = run.student.rows(trajectories, values)
    for row in rows:
        # What a shaping did not measure at a position is not a number, which JSON does not know.
        row["values"] = {name: [None if v != v else v for v in column] for name, column in row["values"].items()}
    for row, prompt in zip(rows, trajectories.prompts, strict=True):
        routes = [route for teacher in run.teachers if (route := teacher.route(prompt)) is not None]
        row |= {"teacher": ", ".join(routes)} if routes else {}
    return rows


def judge(run: Run) -> LiveTeacher | None:
    """The first teacher that can be asked at new states."""
    return next((teacher for teacher in run.teachers if teacher.everywhere), None)


def by_prompt(trajectories: Trajectories, k: int) -> dict[str, float]:
    """Mean verdict of each prompt that has one, by the prompt's id."""
    if trajectories.rewards is None:
        return {}
    means = trajectories.rewards.view(-1, k).nanmean(1).tolist()
    ids = [prompt.id for prompt in trajectories.prompts[::k]]
    return {name: mean for name, mean in zip(ids, means, strict=True) if mean == mean}


def outcomes(trajectories: Trajectories, k: int) -> dict[str, float]:
    """Sums over this process's trajectories, `k` of each prompt."""
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


def totals(run: Run, sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The named sums over all processes; a process without a prompt adds nothing."""
    mine = torch.tensor([float(sums.get(name, 0.0)) for name in names], dtype=torch.float64)
    return dict(zip(names, run.sum_over_processes(mine).tolist(), strict=True))


def accuracies(total: Mapping[str, float], k: int) -> dict[str, float]:
    """`accuracy` (Avg@k: the mean over prompts and samples) and with k > 1 `pass_at_k` (share of prompts with a right
    answer among k); nothing where no verdict was given."""
    if not total["verified"]:
        return {}
    found = {"accuracy": total["accuracy"] / total["verified"]}
    return found | ({"pass_at_k": total["passed"] / total["prompts"]} if k > 1 else {})
