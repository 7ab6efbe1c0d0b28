"""What held-out measurements of every kind of student are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from opd.policies.evaluation import Evaluation
from opd.prompts import Prompt
from opd.rollouts import PrefixSource
from opd.teachers import LiveTeacher
from opd.trajectories import Trajectories

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


class Warns(Protocol):
    def warn_once(self, text: str) -> None:
        """Show a person a line, the first time alone."""


class Measured(Protocol):
    """What held-out measurements need of a run."""

    @property
    def held_out(self) -> Sequence[Prompt]:
        """Those of all processes."""

    @property
    def sampler(self) -> PrefixSource:
        """The student's own rollouts."""

    @property
    def rollout(self) -> PrefixSource:
        """Who writes what the student trains on."""

    @property
    def teachers(self) -> Sequence[LiveTeacher]: ...

    @property
    def micro(self) -> int:
        """Trajectories of one forward pass."""

    @property
    def monitor(self) -> Warns: ...

    def share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """This process's part."""

    def verify(self, trajectories: Trajectories) -> Trajectories:
        """The trajectories with their rewards, where there is a verifier."""

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor: ...


def roll_out(run: Measured, settings: Evaluation, sampler: PrefixSource, prompts: list[Prompt], k: int) -> Trajectories:
    """`k` trajectories of each held-out prompt, with verdicts."""
    budget = settings.longest or run.rollout.settings.budget
    return run.verify(sampler(prompts, k, budget, stream=STREAM))


def with_routes(
    rows: list[dict[str, Any]], prompts: Sequence[Prompt], teachers: Sequence[LiveTeacher]
) -> list[dict[str, Any]]:
    """A student's rows of trajectories, one a prompt, and where a teacher is routed `teacher`, the route that answered
    it."""
    for row, prompt in zip(rows, prompts, strict=True):
        routes = [route for teacher in teachers if (route := teacher.route(prompt)) is not None]
        row |= {"teacher": ", ".join(routes)} if routes else {}
    return rows


def judge(run: Measured) -> LiveTeacher | None:
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


def totals(run: Measured, sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
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
