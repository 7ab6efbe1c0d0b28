"""A reward for the outcome, added to the teacher's word: the plain control of calibrated margins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.distributions import Distribution, Target
from opd.errors import IncompatibleError
from opd.shaping.base import Shape, Shaper
from opd.shaping.outcomes import ByOutcome, compared, right_and_wrong
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.teachers import Answering

BONUS = "bonus"
"""Column of what was added at each position, in nats."""


class OutcomeBonus(ByOutcome):
    """Nats that are added to the teacher's log-probability of every action of a trajectory, by its outcome alone: no
    teacher is looked at.

    - `fixed`: `amount` for a right trajectory, `-amount` for a wrong one;
    - `normalised`: `amount` times `(R - mean R) / (std R + 1e-6)` over the group, the advantage of GRPO.

    A group of a single outcome is left alone, as margins leave it; so is a trajectory without a verdict, and one that a
    shaping before this one dropped. With `reduction: sequence_mean` the bonus counts alike in short and long ones.
    """

    kind: Literal["outcome_bonus"] = "outcome_bonus"
    modality: ClassVar[str | None] = "language"
    makes_offsets: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = (BONUS,)
    shown: ClassVar[tuple[str, ...]] = ("bonus/mixed",)
    form: Literal["fixed", "normalised"] = Field("fixed", description="What the amount is multiplied by")
    amount: float = Field(0.2, gt=0, description="Nats a token")

    def words(self, measured: Mapping[str, float], reward: float | None) -> str | None:
        bonus = measured.get(BONUS)
        if not bonus or reward is None:
            return None
        return f"{'right' if reward >= self.right_from else 'wrong'}: {bonus:+.2f} nats a token"

    def check_teachers(self, teachers: Sequence[Answering]) -> None:
        if len(teachers) != 1:
            raise IncompatibleError(
                f"shaping 'outcome_bonus' is added to the word of one teacher, and the recipe has {len(teachers)}: let "
                "one of kind routed choose among them, or leave the shaping out"
            )

    def build(self, context: Context) -> OutcomeBonusShaper:
        return OutcomeBonusShaper()


class OutcomeBonusShaper(Shaper[OutcomeBonus]):
    """The built shaping; it keeps what it found of the last step, to be logged, and nothing that a later step needs."""

    def __init__(self) -> None:
        self.signals: dict[str, float] = {}

    def look(
        self,
        trajectories: Trajectories,
        targets: Sequence[Target],
        settings: OutcomeBonus,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> Trajectories:
        right, wrong = right_and_wrong(trajectories, settings.right_from)
        rewards = trajectories.rewards
        values = torch.full((len(trajectories),), torch.nan) if rewards is None else rewards.float().cpu()
        bonus = torch.zeros(len(trajectories))
        mixed = groups = 0.0
        for each in compared(trajectories, {"right": right, "wrong": wrong, "reward": values}, settings.scope):
            share = len(each.here) / len(each.numbers["right"])
            groups += share
            if not (each.numbers["right"].any() and each.numbers["wrong"].any()):
                continue
            mixed += share
            bonus[each.here] = settings.amount * factors(settings.form, **each.numbers)[each.mine]
        counted = sum_over_processes(torch.tensor([groups, mixed], dtype=torch.float64)).tolist()
        self.signals = {"bonus/mixed": counted[1] / counted[0]} if counted[0] else {}
        column = bonus.repeat_interleave(trajectories.lengths)
        return replace(trajectories, columns={**trajectories.columns, BONUS: column})

    def own_signals(self) -> Mapping[str, float]:
        return self.signals

    def __call__(
        self, student: Distribution, targets: Sequence[Target], micro: Trajectories, settings: OutcomeBonus
    ) -> Shape:
        bonus = micro.columns[BONUS].to(micro.actions.device)
        return Shape(torch.ones_like(bonus), bonus, {BONUS: bonus})


def factors(
    form: Literal["fixed", "normalised"], right: torch.Tensor, wrong: torch.Tensor, reward: torch.Tensor
) -> torch.Tensor:
    """float32 `[G]`: what the amount is multiplied by in a group with both outcomes; 0 without a verdict."""
    if form == "fixed":
        return right.float() - wrong.float()
    judged = right | wrong
    of_judged = reward[judged]
    advantages = (reward - of_judged.mean()) / (of_judged.std() + 1e-6)
    return advantages.where(judged, 0.0)
