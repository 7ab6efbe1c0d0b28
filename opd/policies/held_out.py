"""What held-out measurements of every kind of student are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from opd.context import Context
from opd.distributions import Target
from opd.policies.evaluation import Evaluation
from opd.prompts import Prompt
from opd.prompts.messages import text_of
from opd.rollouts import HeldOutSampler, PrefixSource, Rollout
from opd.rollouts.base import Combination
from opd.teachers import LiveTeacher, Teacher, answers_of, failures_of, reasons
from opd.trajectories import Trajectories
from opd.verifiers.base import Scorer

STREAM = -1
"""Random stream of held-out rollouts: the same draws at every evaluation of a run."""

COUNTS = ("positions", "trajectories", "truncated", "accuracy", "verified", "passed", "prompts")
"""Names of the sums that `outcomes` makes."""

TASK = "task"
"""Column by which successes are told apart."""


@dataclass(frozen=True)
class HeldOut:
    """Metrics over all processes; this process's rollouts position by position for samples and reports; `items`, the
    values of `accuracy` and `greedy_accuracy` for each of its prompts by id, where a verifier gave verdicts; `asked`,
    what was asked for the report alone, counted over all processes; `prompts`, of how many the metrics are; and the
    prompts, by id, that are `left_out` of what is said of the teacher in this process, since it did not answer."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    items: dict[str, dict[str, float]]
    asked: dict[str, float] = field(default_factory=dict)
    prompts: int = 0
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Moment:
    """The step at which a student is measured: the settings of what takes part, numbers in the places of schedules.

    Attributes:
        settings: the recipe's evaluation.
        rollout: the recipe's.
        teachers: the recipe's.
        context: facts of the run, with the step's temperature.
        sampler: who writes, under `settings`.
        first: whether no step was taken yet: what stays the same is asked and written down once, then.
    """

    settings: Evaluation
    rollout: Rollout
    teachers: Sequence[Teacher]
    context: Context
    sampler: HeldOutSampler
    first: bool = False


class Warns(Protocol):
    def warn(self, text: str) -> None: ...

    def warn_once(self, text: str) -> None:
        """Show a person a line, the first time alone."""


class Answered(Protocol):
    """What logs need of a run to say who answered, and how."""

    @property
    def teachers(self) -> Sequence[LiveTeacher]: ...

    @property
    def verifier(self) -> Scorer | None: ...


class Measured(Answered, Protocol):
    """What held-out measurements need of a run."""

    @property
    def held_out(self) -> Sequence[Prompt]:
        """Those of all processes."""

    @property
    def rollout(self) -> PrefixSource:
        """Who writes what the student trains on."""

    @property
    def micro(self) -> int:
        """Trajectories of one forward pass."""

    @property
    def monitor(self) -> Warns: ...

    def share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """This process's part."""

    def judged(self, trajectories: Trajectories) -> Trajectories:
        """The trajectories with their rewards, where there is a verifier."""

    def measured(self, trajectories: Trajectories) -> Mapping[str, torch.Tensor]:
        """What the verifier says of outcomes beside their rewards, see `Scorer.measure`."""

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor: ...


def roll_out(
    run: Measured, at: Moment, sampler: HeldOutSampler, prompts: list[Prompt], k: int, judged: bool = True
) -> Trajectories:
    """`k` trajectories of each held-out prompt, with verdicts if `judged`; unless the recipe says how long, as long as
    the student writes in training, or where it does not write, as long as others do."""
    own = max(_bounds_of_student(run.rollout, at.rollout), default=at.rollout.budget)
    failed = failures_of([sampler.source])
    found = sampler(prompts, k, at.settings.longest or own, stream=STREAM)
    asked = len(prompts) * k
    if found.outcomes < asked:
        run.monitor.warn(
            f"this held-out measurement leaves out {asked - found.outcomes} of {asked} rollouts, which could not be "
            f"written ({reasons([sampler.source], since=failed)})"
        )
    return run.judged(found) if judged else found


def _bounds_of_student(source: PrefixSource, settings: Rollout) -> list[int]:
    """Most actions of each source in this one that draws from the student as it is now."""
    if isinstance(source, Combination):
        pairs = zip(source.sources, settings.parts, strict=True)
        return [bound for part, own in pairs for bound in _bounds_of_student(part, own)]
    return [settings.budget] if source.current and source.authors == {"student"} else []


def as_logged(
    rows: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    run: Answered,
    answers: Mapping[str, str] | None = None,
    views: bool = True,
) -> list[dict[str, Any]]:
    """A student's rows of trajectories, one a prompt, with what logs want: where a teacher is routed `teacher` is the
    route that answered, `teacher_answer` is its own text where `answers` has one by prompt id, with `views`
    `teacher_prompt` is what a teacher reads of the prompt where that is not what the student does, the verifier adds
    what it shows, where teachers debated `debate` is what they wrote and, with a verifier, who was `right`, and values
    that are not numbers, as what a shaping did not measure, are None."""
    for row, prompt in zip(rows, prompts, strict=True):
        row["values"] = {name: [None if v != v else v for v in column] for name, column in row["values"].items()}
        routes = [route for teacher in run.teachers if (route := teacher.route(prompt)) is not None]
        row |= {"teacher": ", ".join(routes)} if routes else {}
        if answers is not None and prompt.id in answers:
            row["teacher_answer"] = answers[prompt.id]
        view = other_view(run.teachers, prompt) if views else None
        if view is not None:
            row["teacher_prompt"] = view
        if run.verifier is not None:
            row |= run.verifier.shown(prompt, row)
        held = next((held for teacher in run.teachers if (held := teacher.considered(prompt)) is not None), None)
        if held is not None:
            right = [] if run.verifier is None else [verdicts(run.verifier, prompt, texts) for texts in held["rounds"]]
            row["debate"] = {**held, **({"right": right} if right else {})}
    return rows


def other_view(teachers: Sequence[LiveTeacher], prompt: Prompt) -> str | list[dict[str, str]] | None:
    """What the first teacher that reads another view than the student reads of a prompt, for people: a text, or
    messages of `role` and `content`; None where all read the same. Pictures are left out."""
    for teacher in teachers:
        member = teacher.members().get(teacher.route(prompt) or "")
        if member is None:
            continue
        row, column = member.settings.view(prompt)
        if column is None or column == prompt.column:
            continue
        view = row.view(column)
        if isinstance(view, str):
            return view
        # A view may be a column of pictures alone, of which there is nothing to read.
        if isinstance(view, list) and view and all(isinstance(each, Mapping) and "role" in each for each in view):
            return [{"role": str(each["role"]), "content": text_of(each.get("content"))} for each in view]
        return None
    return None


def verdicts(verifier: Scorer, prompt: Prompt, texts: Sequence[str]) -> list[float | None]:
    """Whether texts that no trajectory holds answer a prompt, None where there is no verdict."""
    count = len(texts)
    nothing = torch.zeros(0, dtype=torch.int64)
    asked = Trajectories(
        prompts=[prompt] * count,
        contexts=[nothing] * count,
        actions=nothing,
        lengths=torch.zeros(count, dtype=torch.int64),
        behaviour_log_probs=torch.zeros(0),
        finished=torch.ones(count, dtype=torch.bool),
        learn=nothing.bool(),
        authors=nothing.to(torch.uint8),
        groups=torch.zeros(count, dtype=torch.int64),
    )
    return [None if each != each else each for each in verifier.score(asked, list(texts)).tolist()]


def judge(run: Measured) -> LiveTeacher | None:
    """The first teacher that can be asked at new states."""
    return next((teacher for teacher in run.teachers if teacher.everywhere), None)


def first_answer(run: Measured, at: Moment, teacher: LiveTeacher, trajectories: Trajectories) -> Target:
    """What one of the run's teachers says first of trajectories."""
    settings = at.teachers[run.teachers.index(teacher)]
    return answers_of(teacher, trajectories, settings, at.context)[0]


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
        trajectories.prompts[first].id: _mean_of(trajectories, _group_of(trajectories, first))
        for first in firsts(trajectories)
    }
    return {name: mean for name, mean in found.items() if mean == mean}


def _mean_of(trajectories: Trajectories, mine: torch.Tensor) -> float:
    """The mean reward of the outcomes of some trajectories; NaN where none is known."""
    assert trajectories.rewards is not None
    if trajectories.episodes is None:
        return float(trajectories.rewards[mine].nanmean())
    rewards, shares = trajectories.rewards[mine], trajectories.shares(trajectories.rewards)[mine]
    return float((rewards.nan_to_num() * shares).sum() / shares.sum())


def outcomes(trajectories: Trajectories) -> dict[str, float]:
    """Sums over this process's trajectories; positions that the environment wrote are not counted."""
    sums = {
        "positions": float(trajectories.chosen.sum()),
        "trajectories": float(len(trajectories)),
        "truncated": float((~trajectories.finished).sum()),
    }
    if trajectories.rewards is not None:
        verdicts = trajectories.rewards
        known, shares = ~verdicts.isnan(), trajectories.shares(verdicts)
        groups = [_group_of(trajectories, first) for first in firsts(trajectories)]
        sums |= {
            "accuracy": float((verdicts[known] * shares[known]).sum()),
            "verified": float(shares.sum()),
            "passed": float(sum(bool((verdicts[mine] >= 1).any()) for mine in groups)),
            "prompts": float(sum(bool(known[mine].any()) for mine in groups)),
        }
    return sums


def details(run: Measured, trajectories: Trajectories) -> dict[str, float]:
    """Sums and counts of what the verifier measures of outcomes beside their rewards."""
    sums: dict[str, float] = {}
    for name, values in run.measured(trajectories).items():
        known = values[~values.isnan()]
        sums |= {f"detail/{name}": float(known.double().sum()), f"detailed/{name}": float(len(known))}
    return sums


def detail_names(run: Measured) -> list[str]:
    """Names of the sums that `details` makes, on any process."""
    measured = () if run.verifier is None else run.verifier.settings.measured
    return [f"{kind}/{name}" for name in measured for kind in ("detail", "detailed")]


def detail_means(total: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Means of what `details` summed; nothing where no verdict was given."""
    start = f"{prefix}detail/"
    names = [name.removeprefix(start) for name in total if name.startswith(start)]
    counts = {name: total[f"{prefix}detailed/{name}"] for name in names}
    return {f"{prefix}{name}": total[start + name] / count for name, count in counts.items() if count}


def by_task(trajectories: Trajectories, task: str) -> dict[str, float]:
    """Sum and number of the outcomes of the rows whose column `TASK` is `task`."""
    if trajectories.rewards is None:
        return {}
    mine = torch.tensor([str(p.fields.get(TASK)) == task for p in trajectories.prompts])
    known = mine & ~trajectories.rewards.isnan()
    values, shares = trajectories.rewards[known], trajectories.shares(trajectories.rewards)[known]
    return {f"accuracy/{task}": float((values * shares).sum()), f"verified/{task}": float(shares.sum())}


def tasks_of(prompts: Sequence[Prompt]) -> list[str]:
    """What the rows' column `TASK` says, where it says several things."""
    tasks = sorted({str(p.fields[TASK]) for p in prompts if TASK in p.fields})
    return tasks if len(tasks) > 1 else []


def success_rates(total: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """The interval of `accuracy`, and `accuracy/TASK` of each task; nothing where no outcome is known."""
    found: dict[str, float] = {}
    if total["verified"]:
        low, high = wilson(total["accuracy"], total["verified"])
        found |= {"accuracy_low": low, "accuracy_high": high}
    for task in tasks:
        if total[f"verified/{task}"]:
            found[f"accuracy/{task}"] = total[f"accuracy/{task}"] / total[f"verified/{task}"]
    return found


def wilson(successes: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of `count` trials, by default of 95 %."""
    if not count:
        return 0.0, 1.0
    share, square = successes / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z * (share * (1 - share) / count + square / (4 * count)) ** 0.5 / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def _group_of(trajectories: Trajectories, index: int) -> torch.Tensor:
    """bool `[B]`: the trajectories of one's group."""
    return trajectories.groups == trajectories.groups[index]


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
