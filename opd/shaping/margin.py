"""Outcome-guided margins (Uni-OPD): within a group, what the teacher says of right and of wrong trajectories."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

import torch
from accelerate.utils import gather_object
from pydantic import Field

from opd.choice import kind_of
from opd.context import Context
from opd.distributions import Distribution, Sampled, Target
from opd.errors import IncompatibleError
from opd.objectives.base import Writing
from opd.reduction import sums_by_trajectory
from opd.shaping.base import Shape, Shaper
from opd.shaping.outcomes import KEPT, ByOutcome, compared, right_and_wrong
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.teachers import Answering

Statistic = Literal["mean", "minmax"]
ROUNDING = 1e-6
"""Nats a token by which returns may differ where student and teacher say the same."""
M = TypeVar("M", bound="Margin")


class Margin(ByOutcome):
    """Base of shapings that compare returns with outcomes. A trajectory's return `G` is the mean of `log p(a_t) - log
    q(a_t)` over its positions that may be learnt from, and a group's margin

    - `mean`: the mean of `G` over its right trajectories less that over its wrong ones;
    - `minmax`: the least `G` of a right one less the largest of a wrong one.

    A group whose margin is less than `delta` is calibrated; one of a single outcome never is. Trajectories without a
    verdict, and those that a shaping before this one dropped, count in no margin.

    `q` is the student that wrote the rollout, which is the student of the step: rollouts in which somebody else wrote,
    an earlier student did, or `top_p` and `top_k` cut, are refused.
    """

    modality: ClassVar[str | None] = "language"
    measures: ClassVar[tuple[str, ...]] = ("return", "group_margin", "group_margin_after", "inverted")
    shown: ClassVar[tuple[str, ...]] = ("margin/before", "margin/inverted")
    statistic: Statistic = Field("mean", description="What of a group's returns the margin is made of")
    delta: float = Field(0.4, ge=0, description="Least margin, in nats a token")

    @abstractmethod
    def calibrate(self, returns: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor, margin: float) -> Calibrated:
        """What is done to a group whose margin is too small.

        Args:
            returns: float64 `[G]`.
            right, wrong: bool `[G]`, who counts as which; both have a member.
            margin: less than `delta`.
        """

    @abstractmethod
    def moved(self, measured: Mapping[str, float]) -> str | None:
        """What it did to a trajectory of a group whose margin is too small; None where it left it as it was."""

    def words(self, measured: Mapping[str, float], reward: float | None) -> str | None:
        dropped = measured.get(KEPT) == 0
        if "group_margin" not in measured or "inverted" not in measured or reward is None or dropped:
            return None
        right, moved = reward >= self.right_from, self.moved(measured)
        if measured["group_margin"] >= self.delta:
            return f"left as it was: its margin of {measured['group_margin']:.2f} is not below {self.delta:g}"
        outcome, where, other = ("right", "below", "a wrong") if right else ("wrong", "above", "a right")
        if measured["inverted"]:
            return f"{outcome}, but its return is {where} {other} one's: {moved or 'left as it was'}"
        return (
            f"{outcome}, its return is not {where} {other} one's, but the margin of {measured['group_margin']:.2f} is "
            f"below {self.delta:g}: {moved or 'left as it was'}"
        )

    def mine(self, targets: Sequence[Target]) -> Sequence[Target]:
        """The answers that returns are made of."""
        return targets

    def build(self, context: Context) -> MarginShaper:
        return MarginShaper()

    def check_trajectories(self, rollout: Writing, exact: bool) -> None:
        if rollout.learners != {"student"} or not rollout.current or rollout.stale or not exact:
            raise IncompatibleError(
                f"shaping {kind_of(self)!r} needs the student's log-probabilities as its rollout draws them: take "
                "rollout: student without top_p, top_k and engine.overlap"
            )

    def check_answers(self, teacher: Answering) -> None:
        """Raise `IncompatibleError` when a teacher's answers do not say how likely an action was."""
        if teacher.answers.kind not in ("categorical", "sampled"):
            raise IncompatibleError(
                f"shaping {kind_of(self)!r} needs the teacher's log-probability of the action taken, and this one "
                f"answers {teacher.answers.kind!r}: take a live teacher, or a store of kind exact or sampled"
            )


@dataclass(frozen=True)
class Calibrated:
    """What becomes of the G trajectories of a group: float64 `[G]` nats that are added at each of their positions, and
    whether they stay, bool `[G]`."""

    offsets: torch.Tensor
    kept: torch.Tensor


def margin_of(returns: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor, statistic: Statistic) -> float:
    """The margin of `[G]` returns, bool `[G]` right and wrong; both have a member."""
    above, below = returns[right], returns[wrong]
    found = above.mean() - below.mean() if statistic == "mean" else above.min() - below.max()
    return float(found)


def returns_of(trajectories: Trajectories, targets: Sequence[Target]) -> torch.Tensor:
    """float64 `[B]` on the CPU: the mean of each trajectory's log-ratios, of several answers weighed by their weights.
    NaN where it has no position to learn from."""
    taken = trajectories.behaviour_log_probs.float()
    total, weights = torch.zeros_like(taken), torch.zeros_like(taken)
    for target in targets:
        weight = torch.as_tensor(target.weight, device=taken.device, dtype=taken.dtype)
        answered = Sampled.of(target.distribution, trajectories.actions).log_probs.to(taken)
        total, weights = total + weight * (answered - taken), weights + weight
    counts = trajectories.learnt.to(taken.device) & (weights > 0)
    ratios = torch.where(counts, total / weights.where(counts, 1.0), 0.0)
    lengths = trajectories.lengths
    return (sums_by_trajectory(ratios, lengths) / sums_by_trajectory(counts.float(), lengths)).double().cpu()


def inverted(returns: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """float32 `[G]`: 1 for a right trajectory with less return than some wrong one and for a wrong one with more than
    some right one, 0 for the others, NaN for those that are neither. Both outcomes have a member."""
    found = torch.full((len(returns),), torch.nan)
    found[right] = (returns[right] < returns[wrong].max() - ROUNDING).float()
    found[wrong] = (returns[wrong] > returns[right].min() + ROUNDING).float()
    return found


LEVELS = (10, 50, 90)
"""Percentiles of the margins of a step's groups that are logged."""

FOUND = ("groups", "mixed", "calibrated", "before", "after", "lam", "inverted", "pairs", "inverted_pairs")
FOUND_OF_EACH = ("raised", "lowered", "masked", "trajectories")


class MarginShaper(Shaper[M], Generic[M]):
    """The built shaping. It keeps what it found of the last step, to be logged, and nothing that a later step needs."""

    def __init__(self) -> None:
        self.signals: dict[str, float] = {}

    def look(
        self,
        trajectories: Trajectories,
        targets: Sequence[Target],
        settings: M,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> Trajectories:
        returns = returns_of(trajectories, settings.mine(targets))
        right, wrong = right_and_wrong(trajectories, settings.right_from)
        counts = ~returns.isnan()
        numbers = {"return": returns, "right": right & counts, "wrong": wrong & counts}
        count = len(trajectories)
        by_group = ("group_margin", "group_margin_after", "inverted")
        margins = {name: torch.full((count,), torch.nan) for name in by_group}
        spread: dict[str, list[float]] = {"before": [], "after": []}
        offsets, kept = torch.zeros(count), torch.ones(count)
        # A set that all processes see is counted on each of them, and each counts a part of it.
        found = dict.fromkeys((*FOUND, *FOUND_OF_EACH), 0.0)
        for each in compared(trajectories, numbers, settings.scope):
            share = len(each.here) / len(each.numbers["return"])
            found["groups"] += share
            of_set = each.numbers
            if not (of_set["right"].any() and of_set["wrong"].any()):
                continue
            done, measured = calibrated(settings, of_set["return"], of_set["right"], of_set["wrong"])
            for name, value in measured.items():
                found[name] += share * value
            margins["group_margin"][each.here] = measured["before"]
            margins["group_margin_after"][each.here] = measured["after"]
            margins["inverted"][each.here] = inverted(of_set["return"], of_set["right"], of_set["wrong"])[each.mine]
            for name, values in spread.items():
                values.append(measured[name])
            offsets[each.here], kept[each.here] = done.offsets[each.mine].float(), done.kept[each.mine].float()
        found["raised"], found["lowered"] = float((offsets > 0).sum()), float((offsets < 0).sum())
        found["masked"], found["trajectories"] = float((kept == 0).sum()), float(count)
        self.signals = self._over_all(found, sum_over_processes) | percentiles(spread)
        self.signals["margin/delta"] = settings.delta
        columns = {"return": returns.float(), **margins, "margin_offset": offsets, "margin_kept": kept}
        by_position = {name: value.repeat_interleave(trajectories.lengths) for name, value in columns.items()}
        return replace(trajectories, columns={**trajectories.columns, **by_position})

    @staticmethod
    def _over_all(
        found: Mapping[str, float], sum_over_processes: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, float]:
        sums = sum_over_processes(torch.tensor(list(found.values()), dtype=torch.float64)).tolist()
        total = dict(zip(found, sums, strict=True))
        shares = [("mixed", "groups"), *((name, "trajectories") for name in ("raised", "lowered", "masked"))]
        shares += [(name, "mixed") for name in ("calibrated", "before", "after", "inverted")]
        shares += [("lam", "calibrated"), ("inverted_pairs", "pairs")]
        return {f"margin/{name}": total[name] / total[whole] for name, whole in shares if total[whole]}

    def own_signals(self) -> Mapping[str, float]:
        return self.signals

    def __call__(self, student: Distribution, targets: Sequence[Target], micro: Trajectories, settings: M) -> Shape:
        device = micro.actions.device
        columns = {
            name: micro.columns[name].to(device) for name in (*settings.measures, "margin_offset", "margin_kept")
        }
        return Shape(
            columns["margin_kept"],
            columns["margin_offset"] if settings.makes_offsets else None,
            {name: columns[name] for name in settings.measures},
        )


def percentiles(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """`margin/NAME_pLEVEL` of the margins of the groups of all processes, by name; nothing where there are none."""
    parts: Sequence[Mapping[str, Sequence[float]]] = gather_object([dict(found)])
    together = {name: [value for part in parts for value in part[name]] for name in found}
    return {
        f"margin/{name}_p{level}": float(torch.quantile(torch.tensor(values, dtype=torch.float64), level / 100))
        for name, values in together.items()
        for level in LEVELS
        if values
    }


def calibrated(
    settings: Margin, returns: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor
) -> tuple[Calibrated, dict[str, float]]:
    """What becomes of a group with right and wrong trajectories, and what is to be said of it: its margin before and
    after, what it lacked, and how many of its pairs of a right and a wrong one the returns have the other way round."""
    before = after = margin_of(returns, right, wrong, settings.statistic)
    done = Calibrated(torch.zeros_like(returns), torch.ones_like(right))
    if before < settings.delta:
        done = settings.calibrate(returns, right, wrong, before)
        after = margin_of(returns + done.offsets, right & done.kept, wrong & done.kept, settings.statistic)
    inverted = returns[right][:, None] < returns[wrong][None, :] - ROUNDING
    return done, {
        "mixed": 1.0,
        "calibrated": float(before < settings.delta),
        "before": before,
        "after": after,
        "lam": max(0.0, settings.delta - before),
        "inverted": float(inverted.any()),
        "pairs": float(inverted.numel()),
        "inverted_pairs": float(inverted.sum()),
    }
