"""Episodes: what stands in `Trajectories.contexts` of policies that act, and how they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd.acting.seeing import Plan, Seen
from opd.prompts import Prompt
from opd.trajectories import AUTHORS, Author, Trajectories


@dataclass(frozen=True)
class Episode:
    """What an episode of L decisions holds besides its `L * M` action tokens.

    Attributes:
        instruction: what was to be done.
        seen: L observations, those that the decisions were made on.
        outcome: 1 where it succeeded; NaN where nobody knows.
        steps: environment steps that were played.
        plans: L plans of the environment's own expert at these states; None where it was not asked.
        frames: uint8 `[steps, h, w, 3]`, what a person would have seen; None where nothing was kept.
        each: the observation before each environment step, where those between decisions were kept too.
    """

    instruction: str
    seen: Sequence[Seen]
    outcome: float
    steps: int
    plans: Sequence[Plan] | None = None
    frames: np.ndarray | None = None
    each: Sequence[Seen] = ()


@dataclass(frozen=True)
class Played:
    """One episode with what was done in it.

    Attributes:
        actions: int64 `[L * M]` ids.
        log_probs: float32 `[L * M]`, of each under what it was drawn from.
        learn: bool `[L * M]`: tokens of actions that were played before the episode was over.
        finished: it ended by itself, by success; False where it was cut.
        lost: the simulator failed in it.
    """

    episode: Episode
    actions: torch.Tensor
    log_probs: torch.Tensor
    learn: torch.Tensor
    finished: bool
    lost: bool = False


def pack(prompts: Sequence[Prompt], group: int, rows: Sequence[Played], author: Author) -> Trajectories:
    """Trajectories of P prompts from P * group episodes, with their outcomes as rewards."""
    empty = torch.zeros(0)
    actions = torch.cat([empty.long(), *(row.actions for row in rows)])
    return Trajectories(
        prompts=[prompt for prompt in prompts for _ in range(group)],
        contexts=[row.episode for row in rows],
        actions=actions,
        lengths=torch.tensor([len(row.actions) for row in rows]),
        behaviour_log_probs=torch.cat([empty, *(row.log_probs for row in rows)]),
        finished=torch.tensor([row.finished for row in rows]),
        learn=torch.cat([empty.bool(), *(row.learn for row in rows)]),
        authors=torch.full((len(actions),), AUTHORS.index(author), dtype=torch.uint8),
        groups=torch.arange(len(prompts)).repeat_interleave(group),
        rewards=torch.tensor([torch.nan if row.lost else row.episode.outcome for row in rows], dtype=torch.float32),
        lost=torch.tensor([row.lost for row in rows]) if any(row.lost for row in rows) else None,
    )
