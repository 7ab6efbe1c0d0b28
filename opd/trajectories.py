"""What a rollout returns: states that the student will learn on, packed, and who acted in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from opd.prompts import Prompt

Author = Literal["student", "teacher", "data"]
"""Who chose an action."""

AUTHORS: tuple[Author, ...] = ("student", "teacher", "data")


PACKED = ("actions", "behaviour_log_probs", "learn", "authors")
"""Fields with one entry a position."""

KNOWN_OF_SOME = ("rewards", "group_mean", "group_spread", "stored")
"""Fields with one entry a trajectory, or None."""


@dataclass(frozen=True)
class Trajectories:
    """B trajectories of N positions in all, packed without padding: trajectory i owns `lengths[i]` positions in order.

    Attributes:
        prompts: B prompts (a prompt of a group of G stands G times, next to each other).
        contexts: B entries of whatever the policy needs to build its states; for language the prompt's token ids, for
            flow models a `Denoising`.
        actions: what was done at each position: for language int64 `[N]`, the completion's token ids, end token
            included when it was reached; for flow models float32 `[N, C, H, W]`, the next latent.
        lengths: int64 `[B]` on the CPU; the only thing that decides where a completion ends.
        behaviour_log_probs: float32 `[N]`, log-probability of each action under the distribution it was drawn from.
        finished: bool `[B]`, the trajectory ended by itself; False where it was cut by the budget.
        learn: bool `[N]`, positions that may enter a loss; others (a tool's output) never do.
        authors: uint8 `[N]`, who chose each action, as an index into `AUTHORS`.
        groups: int64 `[B]`, index of the prompt that each trajectory belongs to.
        rewards: float32 `[B]` from a verifier, or None.
        reward_spread: standard deviation of all known rewards of the step, on all processes; None without rewards.
        group_mean, group_spread: float32 `[B]`, mean and sample standard deviation of the known rewards of each one's
            group; None without rewards. They are the step's, so that a micro-batch may hold part of a group.
        stored: int64 `[B]`, the row of a store that each trajectory is (a beginning of), -1 for none; or None.
    """

    prompts: Sequence[Prompt]
    contexts: Sequence[Any]
    actions: torch.Tensor
    lengths: torch.Tensor
    behaviour_log_probs: torch.Tensor
    finished: torch.Tensor
    learn: torch.Tensor
    authors: torch.Tensor
    groups: torch.Tensor
    rewards: torch.Tensor | None = None
    reward_spread: float | None = None
    group_mean: torch.Tensor | None = None
    group_spread: torch.Tensor | None = None
    stored: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def positions(self) -> int:
        """N."""
        return self.actions.shape[0]

    def rewarded(self, rewards: torch.Tensor, spread: float) -> Trajectories:
        """These with float32 `[B]` rewards, NaN where there is no verdict; `spread` is that of all of the step's."""
        known, place = ~rewards.isnan(), torch.unique(self.groups, return_inverse=True)[1]
        count = torch.zeros(int(place.max()) + 1).index_add_(0, place, known.float())
        mean = torch.zeros_like(count).index_add_(0, place, rewards.nan_to_num()) / count.clamp(min=1)
        away = torch.where(known, rewards - mean[place], 0.0)
        # A group of one has no spread.
        squares = torch.zeros_like(count).index_add_(0, place, away**2) / (count - 1).clamp(min=1)
        spreads = squares.sqrt()[place]
        return replace(self, rewards=rewards, reward_spread=spread, group_mean=mean[place], group_spread=spreads)

    def reward(self, index: int) -> float | None:
        """The verdict on one trajectory, None where there is none."""
        if self.rewards is None or bool(self.rewards[index].isnan()):
            return None
        return float(self.rewards[index])

    def completions(self) -> list[torch.Tensor]:
        """B views of `actions`."""
        return list(torch.split(self.actions, self.lengths.tolist()))

    def rows(self, start: int, stop: int) -> tuple[Trajectories, slice]:
        """Trajectories `start:stop` and the slice of packed positions that they own."""
        ends = self.lengths.cumsum(0).tolist()
        here = slice(ends[start - 1] if start else 0, ends[stop - 1] if stop else 0)
        part = replace(
            self,
            prompts=self.prompts[start:stop],
            contexts=self.contexts[start:stop],
            actions=self.actions[here],
            lengths=self.lengths[start:stop],
            behaviour_log_probs=self.behaviour_log_probs[here],
            finished=self.finished[start:stop],
            learn=self.learn[here],
            authors=self.authors[here],
            groups=self.groups[start:stop],
            **self._known(slice(start, stop)),
        )
        return part, here

    def _known(self, which: slice | list[int]) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in KNOWN_OF_SOME}
        return {name: None if values is None else values[which] for name, values in found.items()}

    def pick(self, which: Sequence[int]) -> tuple[Trajectories, torch.Tensor]:
        """Trajectories `which`, in that order and with their group's number, and the int64 packed positions that they
        own here."""
        chosen = list(which)
        starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        here = torch.cat([torch.arange(starts[i], starts[i] + int(self.lengths[i])) for i in chosen])
        here = here.to(self.actions.device)
        part = replace(
            self,
            prompts=[self.prompts[i] for i in chosen],
            contexts=[self.contexts[i] for i in chosen],
            lengths=self.lengths[chosen],
            finished=self.finished[chosen],
            groups=self.groups[chosen],
            **self._known(chosen),
            **{name: getattr(self, name)[here.to(getattr(self, name).device)] for name in PACKED},
        )
        return part, here

    def split(self, size: int) -> Iterator[tuple[Trajectories, slice]]:
        """Parts of at most `size` trajectories in order, as `rows` gives them."""
        for start in range(0, len(self), size):
            yield self.rows(start, min(start + size, len(self)))


def join(parts: Sequence[Trajectories], order: Sequence[int]) -> Trajectories:
    """One batch of several: trajectory i of the parts, in their order, takes place `order[i]`; groups are numbered by
    place, so a group's trajectories must end up next to each other."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    lengths = torch.cat([p.lengths for p in parts])
    rewards = [p.rewards for p in parts]
    offset, groups = 0, []
    for part in parts:
        groups.append(part.groups + offset)
        offset += int(part.groups.max()) + 1
    group = torch.cat(groups)[inverse]
    stored = [torch.full_like(p.lengths, -1) if p.stored is None else p.stored for p in parts]
    packed: dict[str, Any] = {}
    for name in PACKED:
        rows = torch.split(torch.cat([getattr(p, name) for p in parts]), lengths.tolist())
        packed[name] = torch.cat([rows[i] for i in inverse])
    all_prompts = [prompt for p in parts for prompt in p.prompts]
    all_contexts = [context for p in parts for context in p.contexts]
    return Trajectories(
        prompts=[all_prompts[i] for i in inverse],
        contexts=[all_contexts[i] for i in inverse],
        lengths=lengths[inverse],
        finished=torch.cat([p.finished for p in parts])[inverse],
        groups=torch.unique_consecutive(group, return_inverse=True)[1],
        rewards=None if any(r is None for r in rewards) else torch.cat([r for r in rewards if r is not None])[inverse],
        stored=None if all(p.stored is None for p in parts) else torch.cat(stored)[inverse],
        **packed,
    )


def continued(first: Trajectories, which: Sequence[int], rest: Trajectories) -> Trajectories:
    """`first`, where the trajectories `which` go on with those of `rest`, one each."""
    place = {index: k for k, index in enumerate(which)}
    ends = rest.lengths.cumsum(0).tolist()
    packed: dict[str, Any] = {}
    for name in PACKED:
        heads = torch.split(getattr(first, name), first.lengths.tolist())
        tail = getattr(rest, name)
        rows = []
        for i, head in enumerate(heads):
            k = place.get(i)
            rows.append(head if k is None else torch.cat([head, tail[(ends[k - 1] if k else 0) : ends[k]]]))
        packed[name] = torch.cat(rows)
    lengths, finished = first.lengths.clone(), first.finished.clone()
    lengths[list(which)] += rest.lengths
    finished[list(which)] = rest.finished
    return replace(first, lengths=lengths, finished=finished, **packed)
