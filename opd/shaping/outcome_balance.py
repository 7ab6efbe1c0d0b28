"""As many right as wrong trajectories of each prompt (Uni-OPD's online balancing)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from opd.context import Context
from opd.distributions import Distribution, Target
from opd.shaping.base import Shape, Shaper
from opd.shaping.outcomes import KEPT, ByOutcome, compared, right_and_wrong
from opd.trajectories import Trajectories

ROUNDING = 1e-9
"""By how much a count that a ratio asks for may miss the next whole number, and is that."""


class OutcomeBalance(ByOutcome):
    """Where a group has more right than `ratio` times its wrong trajectories, so many right ones are dropped by chance;
    else, where it has more wrong ones than the ratio allows, so many wrong ones. One with a single outcome is left
    alone, and so is one of which nothing would remain of either side. `ratio: 0` drops all right ones and `ratio: inf`
    all wrong ones, of single outcomes too. A trajectory without a verdict counts as wrong here.

    Which ones depends on the seed, the step, the prompt and the place in the group alone. A shaping that comes later
    in the list sees who was dropped: a margin before this one is that of all trajectories, one behind it of those kept.
    """

    kind: Literal["outcome_balance"] = "outcome_balance"
    measures: ClassVar[tuple[str, ...]] = (KEPT,)
    shown: ClassVar[tuple[str, ...]] = ("balance/kept",)
    unweighed: ClassVar[str] = "set its denominator to kept, which counts in every objective, or leave it out"
    ratio: float | Literal["inf"] = Field(
        1.0, description="Right trajectories to each wrong one; 0 keeps wrong ones alone, inf right ones"
    )
    denominator: Literal["fixed", "kept"] = Field(
        "fixed",
        description="fixed: dropped trajectories weigh 0 and count in the mean, so a step is smaller; kept: they count "
        "nowhere, in objectives without shaping neither",
    )

    @property
    def narrows(self) -> bool:
        return self.denominator == "kept"

    @property
    def weighs(self) -> bool:
        return self.denominator == "fixed"

    @field_validator("ratio", mode="before")
    @classmethod
    def _is_a_ratio(cls, value: object) -> object:
        if value in (math.inf, "inf"):
            # A file of JSON has no number for it.
            return "inf"
        if not isinstance(value, int | float) or not value >= 0:
            raise ValueError("a ratio is a number from 0, or inf")
        return value

    def words(self, measured: Mapping[str, float], reward: float | None) -> str | None:
        if measured.get(KEPT) != 0:
            return None
        outcome = "right" if reward is not None and reward >= self.right_from else "wrong"
        return f"dropped by chance: more {outcome} ones than the ratio of {float(self.ratio):g} allows"

    def build(self, context: Context) -> OutcomeBalanceShaper:
        return OutcomeBalanceShaper(context.seed)


def dropped(right: torch.Tensor, keys: torch.Tensor, ratio: float) -> torch.Tensor:
    """bool `[G]`, the trajectories to drop.

    Args:
        right: bool `[G]`.
        keys: int64 `[G]`, in whose ascending order they go.
        ratio: right ones to each wrong one, from 0 to inf.
    """
    if ratio in (0.0, math.inf):
        return right if ratio == 0 else ~right
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    out = torch.zeros_like(right)
    if not n_right or not n_wrong:
        return out
    wanted_right, wanted_wrong = math.floor(n_wrong * ratio + ROUNDING), math.floor(n_right / ratio + ROUNDING)
    if n_right > wanted_right >= 1:
        side, excess = right, n_right - wanted_right
    elif n_wrong > wanted_wrong >= 1:
        side, excess = ~right, n_wrong - wanted_wrong
    else:
        return out
    members = side.nonzero()[:, 0]
    out[members[keys[members].argsort(stable=True)[:excess]]] = True
    return out


class OutcomeBalanceShaper(Shaper[OutcomeBalance]):
    """The built shaping. State: how many steps it saw, which with the seed makes its draws."""

    def __init__(self, seed: int):
        self.seed, self.steps = seed, 0
        self.signals: dict[str, float] = {}

    def look(
        self,
        trajectories: Trajectories,
        targets: Sequence[Target],
        settings: OutcomeBalance,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    ) -> Trajectories:
        right, _ = right_and_wrong(trajectories, settings.right_from)
        numbers = {"right": right, "key": self._keys(trajectories)}
        self.steps += 1
        kept = torch.ones_like(right)
        for each in compared(trajectories, numbers, settings.scope):
            out = dropped(each.numbers["right"], each.numbers["key"], float(settings.ratio))
            kept[each.here] = ~out[each.mine]
        counts = torch.stack([torch.ones_like(right), right, kept, right & kept]).double().sum(1)
        count, count_right, count_kept, both = sum_over_processes(counts).tolist()
        self.signals = {"balance/right": count_right / count, "balance/kept": count_kept / count}
        self.signals |= {"balance/right_kept": both / count_kept} if count_kept else {}
        of_positions = kept.repeat_interleave(trajectories.lengths)
        columns = {**trajectories.columns, KEPT: of_positions.float()}
        if settings.denominator == "fixed":
            return replace(trajectories, columns=columns)
        learn = trajectories.learn & of_positions.to(trajectories.learn.device)
        return replace(trajectories, columns=columns, learn=learn)

    def _keys(self, trajectories: Trajectories) -> torch.Tensor:
        """int64 `[B]`, a number for each trajectory that no other process or batch changes."""
        found, member = [], 0
        groups = trajectories.groups.tolist()
        for i, prompt in enumerate(trajectories.prompts):
            member = member + 1 if i and groups[i] == groups[i - 1] else 0
            text = f"balance/{self.seed}/{self.steps}/{prompt.id}/{prompt.repeat}/{member}".encode()
            found.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1)
        return torch.tensor(found)

    def own_signals(self) -> dict[str, float]:
        return self.signals

    def __call__(
        self, student: Distribution, targets: Sequence[Target], micro: Trajectories, settings: OutcomeBalance
    ) -> Shape:
        kept = micro.columns[KEPT].to(micro.actions.device)
        return Shape(kept, measured={KEPT: kept})

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
