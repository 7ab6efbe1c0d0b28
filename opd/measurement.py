"""What one step measures of itself: the signals that logs and curricula read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from opd.distributions import Distribution, Target
from opd.divergences.statistics import likeliest
from opd.errors import RunError
from opd.objectives import Loss, Objective
from opd.objectives.base import label
from opd.reduction import sums_by_trajectory
from opd.shaping import Shape
from opd.teachers import LiveTeacher
from opd.trajectories import AUTHORS, Trajectories, join

SIGNALS = frozenset(
    (
        *("loss", "divergence", "positions", "sampled_tokens", "length", "truncated", "teacher_tokens"),
        *("teacher_hit_rate", "drift", "drift_std", "rollout_gap", "reward", "gradient_norm", "learning_rate"),
        *("skipped", "empty", "invalid", "cpu_seconds", "tokens_per_second"),
        *("epsilon", "scaled_down", "gradient_median", "examples", "one_by_one"),
    )
)
"""Names that a step's log has of its own."""

SHOWN = 4
"""Trajectories of a group that a step leaves for the report."""

LOOKS = 64
"""About how many steps of a run leave alternatives for the report: those of every step would be the largest of its
files."""

LOOKED_AT = 256
"""Positions of a trajectory that have alternatives: those with the largest divergence."""


def looks(step: int, steps: int) -> bool:
    """Whether step `step`, from 0, of a run of `steps` is one that leaves alternatives: the first, the last, and evenly
    many between."""
    return step % -(-max(steps, 1) // LOOKS) == 0 or step == steps - 1


@dataclass(frozen=True)
class Looked:
    """The likeliest tokens of both sides at some positions of one trajectory.

    Attributes:
        places: int64 `[P]`, positions of the trajectory, rising.
        tops: `student` and, where it lists any, `teacher`: ids and probabilities `[P, K]`, most likely first.
    """

    places: torch.Tensor
    tops: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Example:
    """Trajectories of one prompt that a step shows: numbers by position `[N]`, and what was `looked` at of each."""

    trajectories: Trajectories
    values: dict[str, torch.Tensor]
    looked: list[Looked | None]


class Clock:
    """Wall seconds by phase of a step, and this process's CPU seconds for all of it."""

    def __init__(self) -> None:
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start

    def signals(self, positions: int) -> dict[str, float]:
        total = time.perf_counter() - self.started
        phases = {f"seconds/{phase}": seconds for phase, seconds in self.phases.items()}
        cpu = time.process_time() - self.cpu_started
        return {**phases, "seconds/step": total, "cpu_seconds": cpu, "tokens_per_second": positions / total}


class Measurement:
    """Sums over a step's micro-batches; means are over all positions or trajectories of all processes. `before` are the
    tokens that were written and scored for the step's draw."""

    def __init__(self, objectives: Sequence[Objective], before: Mapping[str, float] | None = None) -> None:
        self.before = before or {}
        named = [f"{label(o)}@{o.teacher}" if o.teacher else label(o) for o in objectives]
        # Two terms of one kind on different positions are told apart by their order.
        self.names = [n if named.count(n) == 1 else f"{n} {named[: i + 1].count(n)}" for i, n in enumerate(named)]
        self.answered = {"teacher_tokens": 0.0}
        self.invalid: float | None = None
        self.routed: Sequence[LiveTeacher] = ()
        self.sums: dict[str, float] = {}
        self.parts: list[tuple[Trajectories, dict[str, torch.Tensor]]] = []
        self.looked: dict[tuple[int, int], Looked] = {}
        self._most: tuple[tuple[float, bool], int] | None = None

    def asked(self, teachers: Sequence[LiveTeacher], trajectories: Trajectories) -> None:
        """Count the positions that the step's teachers scored, while rolling out or afterwards, and those whose answers
        they had already; remember who chooses a route for each prompt."""
        self.routed = [t for t in teachers if t.member_role == "route" and any(t.members())]
        wanted = sum(t.voices for t in teachers) * trajectories.positions
        while_rolling_out = {target.teacher for target in trajectories.answers or ()}
        shares = [t.voices * (1.0 if t.settings.name in while_rolling_out else t.asked) for t in teachers]
        scored = sum(shares) * trajectories.positions
        self.answered = {"teacher_tokens": float(scored)}
        if any(t.remembers for t in teachers):
            self.answered |= {"remembered": float(wanted - scored), "wanted": float(wanted)}

    def lost(self, share: float, trajectories: Trajectories, lost: torch.Tensor) -> None:
        """Note the `share` of all processes' rollouts that nobody could write or that no teacher answered, bool `[B]`
        here, which `add` is not told of; the tokens that were sampled for them count."""
        mine = lost.repeat_interleave(trajectories.lengths)
        drawn = (trajectories.chosen & (trajectories.authors != AUTHORS.index("data"))).cpu() & mine
        sampled = float(drawn.sum()) if trajectories.stored is None else 0.0
        # Of a step whose writer lost some already, the teacher was asked about the rest.
        self.invalid = share + (self.invalid or 0.0) * (1 - share)
        self.before = {**self.before, "sampled_tokens": self.before.get("sampled_tokens", 0.0) + sampled}

    def add(
        self,
        losses: Sequence[Loss],
        weights: Sequence[torch.Tensor],
        micro: Trajectories,
        shape: Shape,
        counts: Sequence[torch.Tensor],
        above: torch.Tensor,
        exact_behaviour: bool,
    ) -> None:
        """Take in one micro-batch; its numbers by position stay until the step is over.

        `divergence` is the first objective's value a token; of several objectives each also logs its own. A mean runs
        over the positions that the objective counts: elsewhere nothing is computed.

        Args:
            weights: float32 `[N]` of each objective, shaping included; zero where it does not count.
            shape: what the shaping said.
            counts: float32 `[N]` of each objective, without the shaping.
            above: bool `[N]`, where there is something to learn (`opd.rounding`).
        """
        counted = [weight != 0 for weight in weights]
        shown = _shown(losses, shape, counted[0])
        self._check_names(shape, losses, shown)
        self.parts.append((micro, shown | shape.measured))
        drawn = micro.chosen & (micro.authors != AUTHORS.index("data"))
        added = {
            "counted": float(torch.stack(counted).any(0).sum()),
            "above": float(above.sum()),
            "trajectories": float(len(micro)),
            "sampled_tokens": float(drawn.sum()) if micro.stored is None else 0.0,
            "loss": sum(float(each.total.detach()) for each in losses),
            "length": float(micro.lengths.sum()),
            "truncated": float((~micro.finished).sum()),
            "stopped": float(sum(reason is not None for reason in micro.stopped or ())),
            "watched": 0.0 if micro.stopped is None else float(len(micro)),
        }
        of_each = zip(range(len(losses)), losses, counted, strict=True)
        for i, loss, here in of_each:
            added |= {f"value/{i}": float(loss.values[here].sum()), f"positions/{i}": float(here.sum())}
            for name, found in loss.measured.items():
                _add_mean(added, name, found, here)
        whole = torch.stack([count != 0 for count in counts]).any(0)
        for name, found in shape.measured.items():
            _add_mean(added, name, found, whole)
        log_probs, computed = _looked_at(losses, counted)
        gap = log_probs - micro.behaviour_log_probs
        if exact_behaviour:
            added |= {"gap": float(gap[computed].abs().sum()), "gap_positions": float(computed.sum())}
        if micro.stored is not None:
            ratio = gap[computed & (micro.authors == AUTHORS.index("student"))].exp().double()
            added |= {
                "moved": float(ratio.sum()),
                "moved_squared": float((ratio**2).sum()),
                "moved_positions": float(len(ratio)),
            }
        if micro.rewards is not None:
            known, share = ~micro.rewards.isnan(), _share(micro)
            rewarded = float((micro.rewards[known] * share[known]).sum())
            added |= {"reward": rewarded, "rewarded": float(share.sum())}
        added |= self._by_route(micro, counted[0], whole, shown, shape.measured)
        for name, value in added.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @torch.no_grad()
    def look(
        self,
        student: Distribution,
        answers: Sequence[Target],
        losses: Sequence[Loss],
        weights: Sequence[torch.Tensor],
        micro: Trajectories,
        shape: Shape,
    ) -> None:
        """Keep the likeliest tokens of the student and of the first teacher for `example`, of the micro-batch that is
        added next; under the weights that made the losses, so before the step is taken.

        Which prompt the example is of is known when the step is over: of the one that is furthest ahead so far they are
        kept. Where a later part of it alone puts a prompt ahead, its earlier parts have none.
        """
        values = _shown(losses, shape, weights[0] != 0)
        how = _how(micro, values)
        groups = micro.groups.tolist()
        for group in dict.fromkeys(groups):
            if self._most is None or how[group] > self._most[0]:
                if self._most is not None and self._most[1] != group:
                    self.looked.clear()
                self._most = (how[group], group)
        starts = [0, *micro.lengths.cumsum(0).tolist()]
        for i, group in enumerate(groups):
            if self._most is None or group != self._most[1] or starts[i] == starts[i + 1]:
                continue
            far = values["divergence"][starts[i] : starts[i + 1]].abs().nan_to_num()
            places = far.topk(min(LOOKED_AT, len(far))).indices.sort().values.cpu()
            sides = {"student": student, **({"teacher": answers[0].distribution} if answers else {})}
            tops = {side: likeliest(one, places + starts[i]) for side, one in sides.items()}
            known = {side: top for side, top in tops.items() if top is not None}
            if known:
                self.looked[len(self.parts), i] = Looked(places, known)

    def _by_route(
        self,
        micro: Trajectories,
        counted: torch.Tensor,
        whole: torch.Tensor,
        shown: Mapping[str, torch.Tensor],
        measured: Mapping[str, torch.Tensor],
    ) -> dict[str, float]:
        """Sums over the trajectories of each route of a routed teacher, of all routes that there are: bool `[N]` is
        where the first objective counts (`counted`) and where some objective would without weights (`whole`)."""
        added: dict[str, float] = {}
        for teacher in self.routed:
            chosen = [teacher.route(prompt) for prompt in micro.prompts]
            for route in teacher.members():
                place = _place(teacher, route)
                mine = torch.tensor([each == route for each in chosen])
                here = mine.repeat_interleave(micro.lengths).to(counted.device)
                rewards = torch.full((len(micro),), torch.nan) if micro.rewards is None else micro.rewards.cpu()
                share = torch.zeros(len(micro)) if micro.rewards is None else _share(micro).cpu() * mine
                known = share > 0
                added |= {
                    f"{place}/trajectories": float(mine.sum()),
                    f"{place}/length": float(micro.lengths[mine].sum()),
                    f"{place}/reward": float((rewards[known] * share[known]).sum()),
                    f"{place}/rewarded": float(share.sum()),
                    f"{place}/divergence": float(shown["divergence"][counted & here].sum()),
                    f"{place}/positions": float((counted & here).sum()),
                }
                for name, values in measured.items():
                    _add_mean(added, f"{place}/{name}", values, whole & here)
        return added

    def _route_signals(self, total: Mapping[str, float]) -> dict[str, float]:
        """Means by route; one over nothing is left out. Those of what shapings measured stand among the others."""
        signals: dict[str, float] = {}
        for place in (_place(teacher, route) for teacher in self.routed for route in teacher.members()):
            if f"{place}/trajectories" not in total:
                continue
            signals[f"{place}/trajectories"] = total[f"{place}/trajectories"]
            for name, count in (("length", "trajectories"), ("reward", "rewarded"), ("divergence", "positions")):
                if total[f"{place}/{count}"]:
                    signals[f"{place}/{name}"] = total[f"{place}/{name}"] / total[f"{place}/{count}"]
        return signals

    def _check_names(self, shape: Shape, losses: Sequence[Loss], shown: Mapping[str, torch.Tensor]) -> None:
        """Raise `RunError` for what a shaping measured under a name that something else has."""
        taken = {*shown, *SIGNALS, *(name for loss in losses for name in loss.measured)}
        if twice := sorted(shape.measured.keys() & taken):
            raise RunError(
                f"the shaping measures {twice[0]!r}, and the log has something else of that name; give it another one"
            )

    @property
    def example(self) -> list[Example]:
        """Trajectories of one prompt with their numbers, as `parts` are; at most `SHOWN`, different rewards first.

        The prompt is the one with the largest offset, without offsets the first one of which a trajectory weighs
        nothing, and else the first.
        """
        members: dict[int, list[tuple[int, int]]] = {}
        moved: dict[int, tuple[float, bool]] = {}
        for k, (micro, values) in enumerate(self.parts):
            for i, group in enumerate(micro.groups.tolist()):
                members.setdefault(group, []).append((k, i))
            for group, how in _how(micro, values).items():
                moved[group] = max(how, moved.get(group, how))
        if not members:
            return []
        if any(micro.episodes is not None for micro, _ in self.parts):
            return self._episodes(members[max(moved, key=lambda group: moved[group])])
        # Of each reward the first one, then of each the second, and so on.
        seen: dict[float | None, int] = {}
        turns = []
        for k, i in members[max(moved, key=lambda group: moved[group])]:
            reward = self.parts[k][0].reward(i)
            seen[reward] = seen.get(reward, 0) + 1
            turns.append((seen[reward], k, i))
        shown = sorted((k, i) for _, k, i in sorted(turns, key=lambda turn: turn[0])[:SHOWN])
        found = []
        for k in dict.fromkeys(k for k, _ in shown):
            micro, values = self.parts[k]
            mine = [i for of, i in shown if of == k]
            one, here = micro.pick(mine)
            picked = {name: value[here.to(value.device)] for name, value in values.items()}
            found.append(Example(one, picked, [self.looked.get((k, i)) for i in mine]))
        return found

    def _episodes(self, turns: Sequence[tuple[int, int]]) -> list[Example]:
        """Whole episodes out of the `turns` of one prompt, `(part, trajectory)` each: the first one of each reward, at
        most `SHOWN`, each as one entry."""
        episodes: dict[int, list[tuple[int, int]]] = {}
        for k, i in turns:
            of = self.parts[k][0].episodes
            episodes.setdefault(-1 if of is None else int(of[i]), []).append((k, i))
        seen: dict[float | None, int] = {}
        order = []
        for played in episodes.values():
            k, i = played[0]
            reward = self.parts[k][0].reward(i)
            seen[reward] = seen.get(reward, 0) + 1
            order.append((seen[reward], played))
        found = []
        for _, played in sorted(order, key=lambda each: each[0])[:SHOWN]:
            taken: list[tuple[Trajectories, dict[str, torch.Tensor]]] = []
            looked: list[Looked | None] = []
            for k in dict.fromkeys(k for k, _ in played):
                micro, values = self.parts[k]
                mine = [i for of, i in played if of == k]
                one, here = micro.pick(mine)
                taken.append((one, {name: value[here.to(value.device)] for name, value in values.items()}))
                looked += [self.looked.get((k, i)) for i in mine]
            parts = [one for one, _ in taken]
            whole = join(parts, range(sum(map(len, parts))))
            names = taken[0][1].keys()
            joint = {name: torch.cat([values[name] for _, values in taken]) for name in names}
            found.append(Example(whole, joint, looked))
        return found

    @property
    def positions(self) -> int:
        """Of this process's whole step, whether they count or not."""
        return sum(micro.positions for micro, _ in self.parts)

    def values(self) -> dict[str, torch.Tensor]:
        """float32 `[N]` by name, the numbers by position of this process's whole step."""
        names = self.parts[0][1] if self.parts else ()
        return {name: torch.cat([found[name] for _, found in self.parts]) for name in names}

    def clear(self) -> None:
        """Forget the micro-batches taken in."""
        self.sums, self.parts, self.looked, self._most = {}, [], {}, None

    def finite(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether the step's loss is a number, on all processes."""
        loss = sum_over_processes(torch.tensor([self.sums.get("loss", 0.0)], dtype=torch.float64))
        return bool(loss.isfinite().all())

    def learns(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether some position of some process has something to learn."""
        return bool(sum_over_processes(torch.tensor([self.sums.get("above", 0.0)], dtype=torch.float64)).item())

    def signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What the step logs; a mean over no positions at all is left out."""
        # Of a draw without prompts nothing else is known.
        known = ("loss", "counted", "trajectories", "sampled_tokens", "length", "truncated", "stopped", "watched")
        self.sums = dict.fromkeys(known, 0.0) | self.sums | self.answered
        for name, tokens in self.before.items():
            self.sums[name] += tokens
        names = list(self.sums)
        totals = sum_over_processes(torch.tensor([self.sums[n] for n in names], dtype=torch.float64))
        total = dict(zip(names, totals.tolist(), strict=True))
        trajectories = max(total["trajectories"], 1.0)
        signals = {"loss": total["loss"]}
        values = {
            name: total[f"value/{i}"] / total[f"positions/{i}"]
            for i, name in enumerate(self.names)
            if total.get(f"positions/{i}")
        }
        if total.get("positions/0"):
            signals["divergence"] = values[self.names[0]]
        signals |= {
            "positions": total["counted"],
            "sampled_tokens": total["sampled_tokens"],
            "length": total["length"] / trajectories,
            "truncated": total["truncated"] / trajectories,
        }
        if self.invalid is not None:
            signals["invalid"] = self.invalid
        if total["watched"]:
            signals["stopped"] = total["stopped"] / trajectories
        if len(self.names) > 1:
            signals |= {f"objective/{name}": value for name, value in values.items()}
        measured = [name.removeprefix("measured/") for name in names if name.startswith("measured/")]
        signals |= {
            name: total[f"measured/{name}"] / total[f"known/{name}"] for name in measured if total[f"known/{name}"]
        }
        signals |= self._route_signals(total)
        signals["teacher_tokens"] = total["teacher_tokens"]
        if "wanted" in total:
            signals["teacher_hit_rate"] = total["remembered"] / max(total["wanted"], 1.0)
        if total.get("moved_positions"):
            mean = total["moved"] / total["moved_positions"]
            signals["drift"] = mean
            signals["drift_std"] = max(0.0, total["moved_squared"] / total["moved_positions"] - mean**2) ** 0.5
        if total.get("gap_positions"):
            signals["rollout_gap"] = total["gap"] / total["gap_positions"]
        if total.get("rewarded"):
            signals["reward"] = total["reward"] / total["rewarded"]
        return signals


def _shown(losses: Sequence[Loss], shape: Shape, counted: torch.Tensor) -> dict[str, torch.Tensor]:
    """float32 `[N]` by name: what the report paints tokens by, beside what a shaping measured."""
    shown = {"divergence": losses[0].values, "weight": shape.weights * counted}
    return shown | ({} if shape.offsets is None else {"offset": shape.offsets})


def _how(micro: Trajectories, values: Mapping[str, torch.Tensor]) -> dict[int, tuple[float, bool]]:
    """By group, how much was done to it, for `example`: the largest mean offset of a trajectory, and whether one weighs
    nothing."""
    sizes = [torch.zeros(len(micro))] * 2
    for i, name in enumerate(("offset", "weight")):
        if name in values:
            sizes[i] = sums_by_trajectory(values[name].abs(), micro.lengths).cpu() / micro.lengths.clamp(min=1)
    found: dict[int, tuple[float, bool]] = {}
    for i, group in enumerate(micro.groups.tolist()):
        how = (float(sizes[0][i]), bool(sizes[1][i] == 0))
        found[group] = max(how, found.get(group, how))
    return found


def _share(micro: Trajectories) -> torch.Tensor:
    """float32 `[B]`: how much of an outcome each reward is; a micro-batch may cut an episode, so it is the step's."""
    assert micro.rewards is not None
    return (~micro.rewards.isnan()).float() if micro.reward_share is None else micro.reward_share


def _place(teacher: LiveTeacher, route: str) -> str:
    """What the numbers of one route are logged under."""
    name = teacher.settings.name
    return f"route/{route}@{name}" if name else f"route/{route}"


def _add_mean(added: dict[str, float], name: str, values: torch.Tensor, here: torch.Tensor) -> None:
    """Add to sum and count of the `[N]` values that are known at the positions `here`."""
    known = values[here & ~values.isnan()]
    for key, number in ((f"measured/{name}", float(known.sum())), (f"known/{name}", float(len(known)))):
        added[key] = added.get(key, 0.0) + number


def _looked_at(losses: Sequence[Loss], counted: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(log-probabilities, where they are known)` of the actions taken, from whichever objective looked there."""
    log_probs, known = torch.zeros_like(losses[0].log_probs), torch.zeros_like(counted[0])
    for loss, here in zip(losses, counted, strict=True):
        computed = here if loss.computed is None else loss.computed
        log_probs = torch.where(computed & ~known, loss.log_probs, log_probs)
        known = known | computed
    return log_probs, known
