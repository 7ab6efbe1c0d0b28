"""Held-out measurement of a drafter: how many of its proposals stand, and how far it is from its target at each
slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from opd.divergences import compare
from opd.divergences.statistics import MEANS
from opd.drafting.record import Drafted
from opd.language.evaluation import Writer, compared_rows
from opd.policies.evaluation import Alarm, Better, Evaluation
from opd.policies.held_out import (
    COUNTS,
    HeldOut,
    Measured,
    Moment,
    accuracies,
    by_prompt,
    detail_means,
    detail_names,
    details,
    first_answer,
    firsts,
    judge,
    outcomes,
    roll_out,
    totals,
)

STEPS = ("steps", "committed", "accepted", "tokens")
"""Sums that `counts_of` answers are, besides those by slot."""


class DraftAlarm(Alarm):
    """A band for held-out texts. The entropy is a drafter's own at the slots, which has no band: a new drafter's falls
    with all that it learns, and its texts are the target's whatever it is."""

    entropy: None = Field(None, description="Is not watched of drafters")

    @field_validator("entropy", mode="before")
    @classmethod
    def _has_no_band(cls, value: object) -> object:
        if value is not None:
            raise ValueError("a drafter's entropy falls as it learns, and its texts are the target's: remove the key")
        return value


class DraftEvaluation(Evaluation):
    """Held-out answers of the target, written with the drafter's help."""

    measures: ClassVar[Mapping[str, Better]] = {
        **Evaluation.measures,
        "acceptance_length": "larger",
        "accepted_proposals": "larger",
        "forward_kl": "smaller",
        "top1_agreement": "larger",
    }
    alarm: DraftAlarm | None = Field(DraftAlarm(), description="Warn when held-out texts degenerate; null never warns")
    temperature: float | None = Field(
        None, ge=0, le=1e6, description="Of the target's held-out texts, 0 the likeliest; default the rollout's"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=2,
        le=10_000_000,
        description="Default the rollout's; the first token comes from reading the prompt, without a proposal",
    )

    @property
    def longest(self) -> int | None:
        return self.max_new_tokens

    def alike(self, rollout: bool) -> bool:
        return rollout if self.temperature is None else self.temperature == 0


def measure(run: Measured, student: Writer, at: Moment, slots: int) -> HeldOut:
    """Let the target write to every held-out prompt with the drafter's help, and compare both at every slot that
    counts; of each block there are `slots`.

    Metrics: `acceptance_length`, tokens a verifying pass of the target adds, over all passes (the first token of an
    answer, which needs none, not counted); `accepted_proposals` of a block, and `accepted_at/K`, the share of blocks
    whose proposal at slot K stood; where the target teaches those of `MEANS` in nats, means over the slots; `length` of
    the answers in tokens, `truncated` share, and verdicts.
    """
    prompts = run.share(run.held_out)
    sums: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    items: dict[str, dict[str, float]] = {}
    if prompts:
        trajectories = roll_out(run, at, at.sampler, prompts, at.settings.k)
        sums = outcomes(trajectories) | details(run, trajectories) | counts_of(trajectories.contexts)
        items["accuracy"] = by_prompt(trajectories)
        teacher, shown = judge(run), set(firsts(trajectories))
        done = 0
        for micro, _ in trajectories.split(run.micro):
            answer = None if teacher is None else first_answer(run, at, teacher, micro).distribution
            comparison = compare(student(micro, at.context), answer, micro.actions)
            counted = {"compared": float(micro.learnt.sum())} | comparison.sums(micro.learnt)
            sums |= {name: sums.get(name, 0.0) + value for name, value in counted.items()}
            found = compared_rows(run, student, micro, comparison)
            rows += [row for i, row in enumerate(found, start=done) if i in shown]
            done += len(micro)
    known = [name for name in MEANS if judge(run) is not None or name == "student_entropy"]
    by_slot = [f"at/{k}" for k in range(1, slots + 1)]
    total = totals(run, sums, [*known, *STEPS, "compared", *COUNTS, *by_slot, *detail_names(run)])
    metrics = {name: total[name] / total["compared"] for name in known if total["compared"]}
    if total["steps"]:
        metrics["acceptance_length"] = total["committed"] / total["steps"]
        metrics["accepted_proposals"] = total["accepted"] / total["steps"]
        metrics |= {f"accepted_at/{k}": total[f"at/{k}"] / total["steps"] for k in range(1, slots + 1)}
    metrics["length"] = total["tokens"] / total["trajectories"]
    metrics["truncated"] = total["truncated"] / total["trajectories"]
    metrics |= accuracies(total, at.settings.k) | detail_means(total)
    return HeldOut(metrics, rows, {name: values for name, values in items.items() if values})


def counts_of(records: Sequence[Drafted]) -> dict[str, float]:
    """Sums over answers: verifying `steps` of the target, tokens that these `committed`, proposals `accepted`, blocks
    whose proposal `at/K` was, and all `tokens` of texts along which it verified."""
    records = [each.of_steps() for each in records if each.walked]
    stood = torch.cat([torch.zeros(0, dtype=torch.int64), *(each.accepted for each in records)])
    most = int(stood.max()) if len(stood) else 0
    return {f"at/{k}": float((stood >= k).sum()) for k in range(1, most + 1)} | {
        "steps": float(sum(len(each.anchors) for each in records)),
        "committed": float(sum(int(each.committed.sum()) for each in records)),
        "accepted": float(sum(int(each.accepted.sum()) for each in records)),
        "tokens": float(sum(len(each.response) for each in records)),
    }
