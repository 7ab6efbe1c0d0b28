"""Held-out measurement: what a student makes of prompts that it never trains on. How, is its policy's business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from opd.distributions import Distribution
from opd.prompts import Prompt
from opd.rollouts import HeldOutSampler, PrefixSource, Rollout
from opd.rollouts.base import Combination
from opd.sharding import whole
from opd.teachers import LiveTeacher, answers_of
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.now import Now
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
def evaluate(run: Run, sampler: HeldOutSampler | None = None) -> HeldOut:
    """What the student's policy measures on the held-out prompts, under the settings of the last step that was taken;
    in eval mode, without gradients, and with averaged weights where the update keeps any.

    Args:
        sampler: who writes, for states of somebody else; default the rollout's held-out sampler.
    """
    now = run.at(max(0, run.step - 1))
    training = run.student.module.training
    run.student.module.eval()
    with run.optimiser.averaged(), whole(run.student.module):
        found = run.student.measure(run, now, sampler or run.sampler(now))
    run.student.module.train(training)
    return found


def roll_out(run: Run, now: Now, sampler: HeldOutSampler, prompts: list[Prompt], k: int) -> Trajectories:
    """`k` trajectories of each held-out prompt, with verdicts; unless the recipe says how long, as long as the student
    writes in training, or where it does not write, as long as others do."""
    rollout = now.recipe.rollout
    own = max(_bounds_of_student(run.rollout, rollout), default=rollout.budget)
    budget = now.recipe.evaluation.max_new_tokens or own
    return run.verify(sampler(prompts, k, budget, stream=STREAM))


def _bounds_of_student(source: PrefixSource, settings: Rollout) -> list[int]:
    """Most actions of each source in this one that draws from the student as it is now."""
    if isinstance(source, Combination):
        pairs = zip(source.sources, settings.parts, strict=True)
        return [bound for part, own in pairs for bound in _bounds_of_student(part, own)]
    return [settings.budget] if source.current and source.authors == {"student"} else []


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


def first_answer(run: Run, now: Now, teacher: LiveTeacher, trajectories: Trajectories) -> Distribution:
    """What one of the run's teachers says first of trajectories."""
    settings = now.recipe.teacher[run.teachers.index(teacher)]
    return answers_of(teacher, trajectories, settings, now.context)[0].distribution


def firsts(trajectories: Trajectories) -> list[int]:
    """The first trajectory of each group, in the order of groups."""
    found: dict[int, int] = {}
    for i, group in enumerate(trajectories.groups.tolist()):
        found.setdefault(group, i)
    return [found[group] for group in sorted(found)]


def by_prompt(trajectories: Trajectories) -> dict[str, float]:
    """Mean verdict of each prompt that has one, by the prompt's id."""
    if trajectories.rewards is None:
        return {}
    found = {
        trajectories.prompts[first].id: float(trajectories.rewards[_group_of(trajectories, first)].nanmean())
        for first in firsts(trajectories)
    }
    return {name: mean for name, mean in found.items() if mean == mean}


def outcomes(trajectories: Trajectories) -> dict[str, float]:
    """Sums over this process's trajectories; positions that the environment wrote are not counted."""
    sums = {
        "positions": float(trajectories.chosen.sum()),
        "trajectories": float(len(trajectories)),
        "truncated": float((~trajectories.finished).sum()),
    }
    if trajectories.rewards is not None:
        verdicts = trajectories.rewards
        known = ~verdicts.isnan()
        groups = [_group_of(trajectories, first) for first in firsts(trajectories)]
        sums |= {
            "accuracy": float(verdicts[known].sum()),
            "verified": float(known.sum()),
            "passed": float(sum(bool((verdicts[mine] >= 1).any()) for mine in groups)),
            "prompts": float(sum(bool(known[mine].any()) for mine in groups)),
        }
    return sums


def _group_of(trajectories: Trajectories, index: int) -> torch.Tensor:
    """bool `[B]`: the trajectories of one's group."""
    return trajectories.groups == trajectories.groups[index]


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
