"""Held-out measurement of a language model: its own completions, scored by its teacher token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field

from opd.context import Context
from opd.distributions import Categorical, Target
from opd.divergences import Comparison, compare
from opd.divergences.statistics import KNOWN
from opd.errors import IncompatibleError
from opd.language.engines.in_process import InProcess
from opd.language.rollout import GREEDY, LanguageRollout, SamplingSettings
from opd.policies.evaluation import Better, Evaluation
from opd.policies.held_out import (
    COUNTS,
    HeldOut,
    Measured,
    Moment,
    accuracies,
    as_logged,
    by_prompt,
    by_task,
    detail_means,
    detail_names,
    details,
    first_answer,
    judge,
    outcomes,
    roll_out,
    success_rates,
    tasks_of,
    totals,
)
from opd.prompts import Prompt
from opd.rollouts import HeldOutSampler
from opd.teachers import failures_of, reasons, unanswered
from opd.trajectories import Trajectories

ROW_VALUES = (
    "reverse_kl",
    "forward_kl",
    "reverse_kl_top_k",
    "forward_kl_top_k",
    "reverse_kl_sampled",
    "student_entropy",
    "teacher_entropy",
    "log_q",
    "log_p",
)
"""What a held-out row keeps of each token."""

ASKED = ("teacher_answers", "teacher_tokens")
"""How many answers the teacher gave for the report alone, and their tokens."""

COMPARED = "compared"
"""Positions that student and teacher were compared at: all, unless the teacher did not answer."""

MOVED = ("moved", "moved_squared", "moved_positions")


class LanguageEvaluation(Evaluation):
    """Held-out completions, scored token by token."""

    measures: ClassVar[Mapping[str, Better]] = {
        **Evaluation.measures,
        "forward_kl": "smaller",
        "reverse_kl_top_k": "smaller",
        "forward_kl_top_k": "smaller",
        "reverse_kl_sampled": "smaller",
        "top1_agreement": "larger",
        "greedy_accuracy": "larger",
        "steps": "smaller",
    }
    greedy: bool = Field(False, description="Also measure greedy decoding")
    teacher_answers: Literal["shown"] | bool = Field(
        "shown",
        description="Have the first teacher answer prompts itself, greedily, for the report; shown: once, before "
        "training, as many as samples, where it is a model on the student's device; true: all, at each evaluation, and "
        "judge that: teacher_accuracy",
    )
    temperature: float | None = Field(None, ge=1e-6, le=1e6, description="Of held-out samples; default the run's")
    top_p: float | None = Field(None, gt=0, le=1, description="Of held-out samples; default the student rollout's or 1")
    top_k: int | None = Field(None, ge=0, description="Of held-out samples; default the student rollout's or 0")
    max_new_tokens: int | None = Field(
        None, ge=1, le=10_000_000, description="Default: the student's in the rollout, or the rollout's"
    )

    @property
    def longest(self) -> int | None:
        return self.max_new_tokens

    def alike(self, rollout: bool) -> bool:
        return rollout if self.top_k is None else self.top_k == 1


class Writer(Protocol):
    """A student of language, as far as it is measured."""

    def __call__(self, trajectories: Trajectories, context: Context | None = None) -> Categorical: ...

    @property
    def reader(self) -> InProcess:
        """By whose tokenizer prompts become ids."""

    def tokens(self, ids: torch.Tensor) -> list[str]:
        """The text of each id of `[N]`."""

    def rows(self, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]: ...

    def joined(self, rows: list[dict[str, Any]], prompts: Sequence[Prompt]) -> list[dict[str, Any]]: ...


def measure(run: Measured, student: Writer, at: Moment) -> HeldOut:
    """Roll out every held-out prompt and compare the student with the first teacher that can be asked there, at every
    position that the environment did not write; where that one is routed, with each prompt's own, and where it gives
    several answers, with the first.

    Metrics: `forward_kl`, `reverse_kl`, `student_entropy`, `teacher_entropy` in nats a token, `top1_agreement` (means
    over all tokens; without a teacher the student's entropy alone, and with one that answers less than whole
    distributions what `KNOWN` has, which is said once), `length` in tokens, `truncated` share; where
    training reads a store that holds an earlier student's completions of these prompts, `drift` and `drift_std` of
    `q(a) / q_then(a)` over their tokens; where a verifier gave verdicts those of `accuracies`; with `greedy` also
    `greedy_accuracy` and `greedy_length`; and what the verifier measures beside its verdicts, under its own names.

    Of an agent `accuracy` is the mean outcome of its episodes, with `accuracy_low` and `accuracy_high`, its Wilson
    interval of 95 %, and `accuracy/TASK` by the rows' column `task` where it has several values; `steps` are the turns
    of an episode, and `length` and `truncated` are those of a turn.
    """
    settings = at.settings
    assert isinstance(settings, LanguageEvaluation)
    prompts = run.share(run.held_out)
    sums: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    items: dict[str, dict[str, float]] = {}
    asked: dict[str, float] = {}
    lost: set[str] = set()
    if prompts:
        trajectories = roll_out(run, at, at.sampler, prompts, settings.k)
        sums |= outcomes(trajectories) | details(run, trajectories)
        items["accuracy"] = by_prompt(trajectories)
        if trajectories.episodes is not None:
            sums |= {"episodes": float(trajectories.outcomes), "steps": float(len(trajectories))}
            for task in tasks_of(run.held_out):
                sums |= by_task(trajectories, task)
        answers: dict[str, str] = {}
        if settings.teacher_answers is True:
            found, answers = _taught(run, at, student, prompts)
            sums |= {f"teacher_{name}": value for name, value in found.items()}
        elif settings.teacher_answers == "shown" and at.first and _answers_cheaply(run, at, trajectories):
            found, answers = _taught(run, at, student, prompts[: settings.samples], judged=False)
            asked = {"teacher_answers": found.get("trajectories", 0.0), "teacher_tokens": found.get("positions", 0.0)}
        teacher = judge(run)
        if teacher is not None and teacher.answers.kind != "categorical":
            names = ", ".join(KNOWN[teacher.answers.kind])
            run.monitor.warn_once(
                f"the teacher answers {teacher.answers.kind!r}, not whole distributions: held-out measurements are "
                f"{names}; the others of a teacher are left out"
            )
        if teacher is not None:
            teacher.prepare(trajectories.prompts, at.context)
        compared: list[Trajectories] = []
        failed = failures_of(run.teachers)
        for micro, _ in trajectories.split(run.micro):
            answer = None if teacher is None else first_answer(run, at, teacher, micro)
            if answer is not None and answer.missing is not None:
                gone = unanswered(micro, [answer]).tolist()
                lost |= {prompt.id for prompt, left in zip(micro.prompts, gone, strict=True) if left}
                micro, answer = _answered(micro, answer)
                if not len(micro):
                    continue
            own = student(micro, at.context)
            comparison = compare(own, None if answer is None else answer.distribution, micro.actions)
            for name, value in (comparison.sums(micro.chosen) | {COMPARED: float(micro.chosen.sum())}).items():
                sums[name] = sums.get(name, 0.0) + value
            rows += compared_rows(run, student, micro, comparison, answers, at.first)
            compared.append(micro)
        left_out = len(trajectories) - sum(map(len, compared))
        if left_out:
            run.monitor.warn(
                f"this held-out measurement leaves out {left_out} of {len(trajectories)} rollouts, which got no answer "
                f"of the teacher ({reasons(run.teachers, since=failed)})"
            )
        # The rows of a group share an id; the first sample of a prompt stands for it in reports.
        groups = [group for micro in compared for group in micro.groups.tolist()]
        if any(micro.episodes is not None for micro in compared):
            episodes = [each for micro in compared for each in (micro.episodes if micro.episodes is not None else [])]
            first = {group: int(each) for group, each in reversed(list(zip(groups, episodes, strict=True)))}
            kept = [i for i, group in enumerate(groups) if int(episodes[i]) == first[group]]
            prompts_of = [prompt for micro in compared for prompt in micro.prompts]
            rows = student.joined([rows[i] for i in kept], [prompts_of[i] for i in kept])
        else:
            rows = [row for i, row in enumerate(rows) if groups[i] not in groups[:i]]
        before = run.rollout.written_before(prompts, at.rollout.budget)
        if before is not None:
            sums |= _moved(run, at, student, before)
        if settings.greedy:
            greedy = roll_out(run, at, at.sampler.changed(**GREEDY), prompts, 1)
            found = outcomes(greedy) | details(run, greedy)
            sums |= {f"greedy_{name}": value for name, value in found.items()}
            items["greedy_accuracy"] = by_prompt(greedy)
    asked = {name: value for name, value in totals(run, asked, ASKED).items() if value}
    verdicts = {name: values for name, values in items.items() if values}
    return HeldOut(_means(run, sums, settings.k), rows, verdicts, asked, left_out=frozenset(lost))


def _answers_cheaply(run: Measured, at: Moment, trajectories: Trajectories) -> bool:
    """Whether the first teacher can answer prompts itself with little ado: all of its members are whole models of the
    student's tokenizer that lie on the student's device, and a prompt is not the task of an environment."""
    if not run.teachers or trajectories.episodes is not None:
        return False
    members = run.teachers[0].members().values()
    return bool(members) and all(
        hasattr(member, "language")
        and not member.translates
        and not getattr(member, "offload", False)
        and getattr(member.settings, "mode", None) != "trust_region"
        and next(member.language.parameters()).device == at.context.device
        for member in members
    )


def _answered(micro: Trajectories, answer: Target) -> tuple[Trajectories, Target]:
    """The trajectories that the teacher answered, and what it said of them; the others are not compared."""
    left = (~unanswered(micro, [answer])).nonzero().flatten().tolist()
    kept, here = micro.pick(left)
    return kept, answer.select(here)


def _taught(
    run: Measured, at: Moment, student: Writer, prompts: list[Prompt], judged: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """Sums over the first teacher's own greedy answers, of a routed one each prompt's own; and the texts by prompt id.

    Raises:
        IncompatibleError: there is no teacher, or it is not in this process or has a tokenizer of its own.
    """
    teacher = next(iter(run.teachers), None)
    if teacher is None:
        raise IncompatibleError("evaluation.teacher_answers is true, and the recipe has no teacher; leave it out")
    sums: dict[str, float] = {}
    texts: dict[str, str] = {}
    for route, member in teacher.members().items():
        mine = [prompt for prompt in prompts if (teacher.route(prompt) or "") == route]
        if member.translates:
            raise IncompatibleError(
                "evaluation.teacher_answers is true, and the teacher has tokenizer: own, so that its answers are ids "
                "of that tokenizer, not the student's; leave it out"
            )
        if not hasattr(member, "language"):
            raise IncompatibleError(
                "evaluation.teacher_answers is true, and the teacher is not in this process (kind local, image_text or "
                "self); leave it out"
            )
        if not mine:
            continue
        greedy = SamplingSettings(top_k=1)
        source = LanguageRollout(
            member.language, greedy, at.context, reader=student.reader, author="teacher", view=member.settings.view
        )
        written = roll_out(run, at, HeldOutSampler(source, greedy, at.context), mine, 1, judged)
        for name, value in (outcomes(written) | (details(run, written) if judged else {})).items():
            sums[name] = sums.get(name, 0.0) + value
        said = zip(written.prompts, written.completions(), strict=True)
        texts |= {prompt.id: student.reader.decode(actions) for prompt, actions in said}
    return sums, texts


def _moved(run: Measured, at: Moment, student: Writer, before: Trajectories) -> dict[str, float]:
    """Sums over the tokens that an earlier student wrote of `q(a) / q_then(a)` and its square."""
    sums = dict.fromkeys(MOVED, 0.0)
    for micro, _ in before.split(run.micro):
        log_q = compare(student(micro, at.context), None, micro.actions).values["log_q"]
        ratio = (log_q - micro.behaviour_log_probs).exp().double()
        for name, value in zip(MOVED, (ratio, ratio**2, torch.ones_like(ratio)), strict=True):
            sums[name] += float(value.sum())
    return sums


def _means(run: Measured, sums: dict[str, float], k: int) -> dict[str, float]:
    teacher = judge(run)
    known = ("student_entropy",) if teacher is None else KNOWN[teacher.answers.kind]
    counted = [*COUNTS, *detail_names(run)]
    others = [f"{who}_{name}" for who in ("greedy", "teacher") for name in counted]
    tasks = tasks_of(run.held_out)
    of_tasks = [f"{name}/{task}" for task in tasks for name in ("accuracy", "verified")]
    total = totals(run, sums, [*known, COMPARED, *MOVED, *counted, *others, "episodes", "steps", *of_tasks])
    metrics = {name: total[name] / total[COMPARED] for name in known if total[COMPARED]}
    metrics["length"] = total["positions"] / total["trajectories"]
    metrics["truncated"] = total["truncated"] / total["trajectories"]
    metrics |= accuracies(total, k) | detail_means(total)
    if total["episodes"]:
        metrics["steps"] = total["steps"] / total["episodes"]
        metrics |= success_rates(total, tasks)
    if total["moved_positions"]:
        metrics["drift"] = total["moved"] / total["moved_positions"]
        square = total["moved_squared"] / total["moved_positions"]
        metrics["drift_std"] = max(0.0, square - metrics["drift"] ** 2) ** 0.5
    if total["greedy_trajectories"]:
        metrics["greedy_length"] = total["greedy_positions"] / total["greedy_trajectories"]
        if total["greedy_verified"]:
            metrics["greedy_accuracy"] = total["greedy_accuracy"] / total["greedy_verified"]
            metrics |= detail_means(total, "greedy_")
    if total["teacher_verified"]:
        metrics["teacher_accuracy"] = total["teacher_accuracy"] / total["teacher_verified"]
        metrics |= detail_means(total, "teacher_")
    return metrics


def compared_rows(
    run: Measured,
    student: Writer,
    micro: Trajectories,
    comparison: Comparison,
    answers: Mapping[str, str] | None = None,
    views: bool = True,
) -> list[dict[str, Any]]:
    """Rows for logs of compared trajectories, with the likeliest alternatives at each position; `answers` and `views`
    as in `as_logged`."""
    values = {name: comparison.values[name] for name in ROW_VALUES if name in comparison.values}
    rows = as_logged(student.rows(micro, values), micro.prompts, run, answers, views)
    start = 0
    for row in rows:
        here = slice(start, start + len(row["tokens"]))
        start = here.stop
        row["alternatives"] = {
            side: _alternatives(student, top[0][here], top[1][here]) for side, top in comparison.tops.items()
        }
    return rows


def _alternatives(student: Writer, ids: torch.Tensor, probabilities: torch.Tensor) -> list[list[tuple[str, float]]]:
    """For each position its K most likely tokens and their probabilities."""
    texts = iter(student.tokens(ids.flatten()))
    return [[(next(texts), round(p, 4)) for p in row] for row in probabilities.tolist()]
