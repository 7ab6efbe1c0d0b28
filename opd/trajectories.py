"""What a rollout returns: states that the student will learn on, packed, and who acted in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_type_hints

import numpy as np
import torch

from opd.distributions import Target, joined_targets
from opd.prompts import Prompt

Author = Literal["student", "teacher", "data", "environment"]
"""Who chose an action."""

Outcome: TypeAlias = str | np.ndarray
"""What a trajectory came to, as verifiers read it: a text, or a picture, float32 `[H, W, 3]` in 0..1."""

AUTHORS: tuple[Author, ...] = get_args(Author)

T = TypeVar("T")
ByPosition = Annotated[T, "position"]
"""One entry a packed position."""
ByTrajectory = Annotated[T, "trajectory"]
"""One entry a trajectory."""


@dataclass(frozen=True)
class Trajectories:
    """B trajectories of N positions in all, packed without padding: trajectory i owns `lengths[i]` positions in order.

    Each field says whether it has one entry a position or one a trajectory, so that taking, joining and going on treat
    a new one as they treat these; one without is of the whole step.

    Attributes:
        prompts: B prompts (a prompt of a group of G stands G times, next to each other).
        contexts: B entries of whatever the policy needs to build its states; for language the prompt's token ids, for
            flow models a `Denoising`.
        actions: what was done at each position: for language int64 `[N]`, the completion's token ids, end token
            included when it was reached; for flow models float32 `[N, C, H, W]`, the next latent.
        lengths: int64 `[B]` on the CPU; the only thing that decides where a completion ends.
        behaviour_log_probs: float32 `[N]`, log-probability of each action under the distribution it was drawn from.
        finished: bool `[B]`, the trajectory ended by itself; False where it was cut, by the budget or by a watch.
        learn: bool `[N]`, positions that may enter a loss, unless the environment wrote them (`learnt`).
        authors: uint8 `[N]`, who chose each action, as an index into `AUTHORS`.
        groups: int64 `[B]`, index of the prompt that each trajectory belongs to.
        rewards: float32 `[B]` from a verifier or from the rollout itself, NaN where there is no verdict; or None.
        group_mean, group_spread: float32 `[B]`, mean and sample standard deviation of the known rewards of each one's
            group; None without rewards. They are the step's, so that a micro-batch may hold part of a group.
        stopped: B reasons for which a watch cut a trajectory where it ends, None for one that it did not cut; or None.
        lost: bool `[B]`, the trajectories that whoever writes could not get, with whatever is there of them; None for
            none. They are in nothing of their step.
        stored: int64 `[B]`, the row of a store that each trajectory is (a beginning of), -1 for none; or None.
        columns: tensors `[N, ...]` by name, for what a rollout or a teacher notes of each position (drift, accepted,
            slot, executed, ...).
        answers: what teachers said while the trajectories were written, one target a teacher by its name, for all N
            positions; None where nobody was asked. The run asks those again that are not among them.
        reward_spread: standard deviation of all known rewards of the step, on all processes; None without rewards.
        episodes: int64 `[B]`, which episode each trajectory is a turn of, where an episode gave several, next to each
            other and with one reward; None where each is an outcome of its own.
        reward_share: float32 `[B]`, how much of an outcome each trajectory's reward stands for: a turn with a known
            reward is one part of its episode's turns; None without rewards, or where each is a whole one.
    """

    prompts: ByTrajectory[Sequence[Prompt]]
    contexts: ByTrajectory[Sequence[Any]]
    actions: ByPosition[torch.Tensor]
    lengths: ByTrajectory[torch.Tensor]
    behaviour_log_probs: ByPosition[torch.Tensor]
    finished: ByTrajectory[torch.Tensor]
    learn: ByPosition[torch.Tensor]
    authors: ByPosition[torch.Tensor]
    groups: ByTrajectory[torch.Tensor]
    rewards: ByTrajectory[torch.Tensor | None] = None
    group_mean: ByTrajectory[torch.Tensor | None] = None
    group_spread: ByTrajectory[torch.Tensor | None] = None
    stopped: ByTrajectory[Sequence[str | None] | None] = None
    lost: ByTrajectory[torch.Tensor | None] = None
    stored: ByTrajectory[torch.Tensor | None] = None
    columns: ByPosition[Mapping[str, torch.Tensor]] = field(default_factory=dict)
    answers: ByPosition[tuple[Target, ...] | None] = None
    reward_spread: float | None = None
    episodes: ByTrajectory[torch.Tensor | None] = None
    reward_share: ByTrajectory[torch.Tensor | None] = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def positions(self) -> int:
        """N."""
        return self.actions.shape[0]

    @property
    def chosen(self) -> torch.Tensor:
        """bool `[N]`: positions whose action somebody chose who can be learnt from; the environment is nobody."""
        return self.authors != AUTHORS.index("environment")

    @property
    def learnt(self) -> torch.Tensor:
        """bool `[N]`: positions that may enter a loss; what the environment wrote never does, whatever `learn` says."""
        return self.learn & self.chosen.to(self.learn.device)

    @property
    def outcomes(self) -> int:
        """How many outcomes these are: trajectories, or the episodes that they are turns of."""
        return len(self) if self.episodes is None else len(self.episodes.unique())

    def rewarded(self, rewards: torch.Tensor, spread: float) -> Trajectories:
        """These with float32 `[B]` rewards, NaN where there is no verdict; `spread` is that of all of the step's. An
        episode counts once, however many turns it has."""
        known, place = ~rewards.isnan(), torch.unique(self.groups, return_inverse=True)[1]
        share, each = known.float(), None
        if self.episodes is not None:
            share = each = self.shares(rewards)
        count = torch.zeros(int(place.max()) + 1).index_add_(0, place, share)
        if self.episodes is not None:
            count = count.round()
        mean = torch.zeros_like(count).index_add_(0, place, rewards.nan_to_num() * share) / count.clamp(min=1)
        away = torch.where(known, rewards - mean[place], 0.0)
        # A group of one has no spread.
        squares = torch.zeros_like(count).index_add_(0, place, away**2 * share) / (count - 1).clamp(min=1)
        spreads = squares.sqrt()[place]
        return replace(
            self,
            rewards=rewards,
            reward_spread=spread,
            group_mean=mean[place],
            group_spread=spreads,
            reward_share=each,
        )

    def shares(self, rewards: torch.Tensor) -> torch.Tensor:
        """float32 `[B]`: of how much of an outcome each trajectory's reward speaks. 0 where it is NaN, else 1 over the
        turns of its episode with a known one."""
        known = (~rewards.isnan()).float()
        if self.episodes is None:
            return known
        place = torch.unique(self.episodes, return_inverse=True)[1].to(known.device)
        turns = torch.zeros(int(place.max()) + 1).index_add_(0, place, known)
        return known / turns[place].clamp(min=1)

    def reward(self, index: int) -> float | None:
        """The verdict on one trajectory, None where there is none."""
        if self.rewards is None or bool(self.rewards[index].isnan()):
            return None
        return float(self.rewards[index])

    def completions(self) -> list[torch.Tensor]:
        """B views of `actions`."""
        return list(torch.split(self.actions, self.lengths.tolist()))

    def rows(self, start: int, stop: int) -> tuple[Trajectories, slice]:
        """Trajectories `start:stop` and the slice of packed positions that they own; tensors are views."""
        ends = self.lengths.cumsum(0).tolist()
        here = slice(ends[start - 1] if start else 0, ends[stop - 1] if stop else 0)
        return self._taken(slice(start, stop), here), here

    def pick(self, which: Sequence[int]) -> tuple[Trajectories, torch.Tensor]:
        """Trajectories `which`, in that order and with their group's number, and the int64 packed positions that they
        own here."""
        chosen = torch.tensor(list(which), dtype=torch.int64)
        starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        owned = [torch.arange(starts[i], starts[i] + int(self.lengths[i])) for i in which]
        here = torch.cat([torch.zeros(0, dtype=torch.int64), *owned]).to(self.actions.device)
        return self._taken(chosen, here), here

    def written(self) -> Trajectories:
        """Those of them that are not lost."""
        if self.lost is None or not bool(self.lost.any()):
            return replace(self, lost=None)
        return replace(self.pick((~self.lost).nonzero().flatten().tolist())[0], lost=None)

    def split(self, size: int) -> Iterator[tuple[Trajectories, slice]]:
        """Parts of at most `size` trajectories in order, as `rows` gives them."""
        for start in range(0, len(self), size):
            yield self.rows(start, min(start + size, len(self)))

    def _taken(self, which: slice | torch.Tensor, here: slice | torch.Tensor) -> Trajectories:
        by = {name: which if per == "trajectory" else here for name, per in FIELDS.items()}
        return replace(self, **{name: _take(getattr(self, name), index) for name, index in by.items()})


FIELDS: dict[str, str] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Trajectories, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
"""`"position"` or `"trajectory"` by name; fields of the whole step are not in it."""


OF_STEP = ("group_mean", "group_spread", "reward_spread", "reward_share")
"""What compares rewards with others of the step: of parts that are put together it is made anew."""


def join(parts: Sequence[Trajectories], order: Sequence[int]) -> Trajectories:
    """One batch of several: trajectory i of the parts, in their order, takes place `order[i]`; groups are numbered by
    place, so a group's trajectories must end up next to each other.

    What some parts lack: answers are then dropped (and asked for anew); rewards are NaN there, `stored` is -1, columns
    are NaN, -1 or False. What compares the rewards of a step is dropped (and made anew).
    """
    offset, numbered, played = 0, [], 0
    for part in parts:
        numbered.append(replace(part, groups=part.groups + offset))
        offset += int(part.groups.max()) + 1
        if part.episodes is not None:
            numbered[-1] = replace(numbered[-1], episodes=part.episodes + played)
            played += int(part.episodes.max()) + 1
    lengths = torch.cat([p.lengths for p in parts])
    inverse = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    owned = torch.split(torch.arange(int(lengths.sum())), lengths.tolist())
    found = _arranged(numbered, inverse, torch.cat([owned[i] for i in inverse.tolist()]))
    return replace(found, groups=torch.unique_consecutive(found.groups, return_inverse=True)[1])


def continued(first: Trajectories, which: Sequence[int], rest: Trajectories) -> Trajectories:
    """`first`, where the trajectories `which` go on with those of `rest`, one each; what belongs to a whole trajectory
    is the first's, but for its length, whether it ended, and its reward: one that goes on has that of `rest`, if any.
    """
    place = {index: k for k, index in enumerate(which)}
    heads = torch.split(torch.arange(first.positions), first.lengths.tolist())
    tails = torch.split(torch.arange(rest.positions) + first.positions, rest.lengths.tolist())
    rows = [row for i, head in enumerate(heads) for row in (head, *((tails[place[i]],) if i in place else ()))]
    lengths, finished = first.lengths.clone(), first.finished.clone()
    lengths[list(which)] += rest.lengths
    finished[list(which)] = rest.finished
    both = _arranged([first, rest], torch.arange(len(first)), torch.cat(rows))
    own = {name: getattr(first, name) for name, per in FIELDS.items() if per == "trajectory" and name not in OF_STEP}
    own |= {"lengths": lengths, "finished": finished}
    if both.rewards is not None:
        # The outcome of a beginning is not that of the whole.
        rewards = both.rewards.clone()
        rewards[list(which)] = torch.nan if rest.rewards is None else rest.rewards
        own["rewards"] = rewards
    if rest.lost is not None:
        gone = torch.zeros(len(first), dtype=torch.bool) if first.lost is None else first.lost.clone()
        gone[list(which)] |= rest.lost
        own["lost"] = gone
    if rest.stopped is not None:
        reasons = list(first.stopped or [None] * len(first))
        for index, reason in zip(which, rest.stopped, strict=True):
            reasons[index] = reason
        own["stopped"] = reasons
    return replace(both, **own)


def _arranged(parts: Sequence[Trajectories], which: torch.Tensor, here: torch.Tensor) -> Trajectories:
    """The parts one after the other, of which trajectories `which` and packed positions `here` are taken in order."""
    counts = {"trajectory": [len(p) for p in parts], "position": [p.positions for p in parts]}
    found = {
        name: _together([getattr(p, name) for p in parts], counts[per], which if per == "trajectory" else here)
        for name, per in FIELDS.items()
    }
    return replace(parts[0], **{**found, **dict.fromkeys(OF_STEP)})


def _take(value: Any, index: slice | torch.Tensor) -> Any:
    """The entries `index` of a field's value, whatever holds them."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value[index if isinstance(index, slice) else index.to(value.device)]
    if isinstance(value, Mapping):
        return {name: _take(each, index) for name, each in value.items()}
    if isinstance(value, tuple) and value and isinstance(value[0], Target):
        return tuple(target.select(index) for target in value)
    return value[index] if isinstance(index, slice) else [value[i] for i in index.tolist()]


def _together(values: Sequence[Any], counts: Sequence[int], index: torch.Tensor) -> Any:
    """The entries `index` of several values of one field, one after the other; `counts` are how many each has."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], Mapping):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _together([value.get(name) for value in values], counts, index) for name in names}
    if isinstance(known[0], torch.Tensor):
        whole = torch.cat([_absent(known[0], n) if v is None else v for v, n in zip(values, counts, strict=True)])
        return whole[index.to(whole.device)]
    if isinstance(known[0], tuple) and known[0] and isinstance(known[0][0], Target):
        return _answers_together(values, counts, index)
    filled = [[None] * n if entries is None else entries for entries, n in zip(values, counts, strict=True)]
    return _take([entry for entries in filled for entry in entries], index)


def _answers_together(
    values: Sequence[tuple[Target, ...] | None], counts: Sequence[int], index: torch.Tensor
) -> tuple[Target, ...] | None:
    """What every teacher said of all parts, None where one of them was not asked about one of the parts."""
    names = [None if value is None else [target.teacher for target in value] for value in values]
    if any(each != names[0] for each in names):
        return None
    place = torch.empty_like(index)
    place[index] = torch.arange(len(index))
    answers = zip(*(value for value in values if value is not None), strict=True)
    return tuple(joined_targets(list(each), torch.split(place, list(counts))) for each in answers)


def _absent(like: torch.Tensor, count: int) -> torch.Tensor:
    """`count` entries that say that nothing is known: NaN, False, or -1."""
    value = float("nan") if like.is_floating_point() else False if like.dtype == torch.bool else -1
    return like.new_full((count, *like.shape[1:]), value)
