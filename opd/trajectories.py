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
    stored: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def positions(self) -> int:
        """N."""
        return self.actions.shape[0]

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
            rewards=None if self.rewards is None else self.rewards[start:stop],
            stored=None if self.stored is None else self.stored[start:stop],
        )
        return part, here

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
            rewards=None if self.rewards is None else self.rewards[chosen],
            stored=None if self.stored is None else self.stored[chosen],
            **{name: getattr(self, name)[here.to(getattr(self, name).device)] for name in PACKED},
        )
        return part, here

    def split(self, size: int, whole_groups: bool = False) -> Iterator[tuple[Trajectories, slice]]:
        """Parts of at most `size` trajectories in order; `whole_groups` never cuts a group (a part may then exceed)."""
        start = 0
        groups = self.groups.tolist()
        while start < len(self):
            stop = min(start + size, len(self))
            while whole_groups and stop < len(self) and groups[stop] == groups[stop - 1]:
                stop += 1
            yield self.rows(start, stop)
            start = stop


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
