"""A run: everything that the loop touches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from opd import sharding
from opd.context import Context
from opd.curricula import Course, Draw, Foreseen, MustAskError, NobodyToAsk
from opd.errors import RESUME, IncompatibleError, RunError
from opd.kept_weights import KeptWeights
from opd.measurement import Measurement
from opd.now import Now
from opd.objectives import Target
from opd.policies import Student
from opd.policies.held_out import HeldOut
from opd.prompts import Prompt, count_repeats
from opd.randomness import random_state, set_random_state
from opd.recipe import Recipe
from opd.rollouts import HeldOutSampler, PrefixSource
from opd.rollouts.base import Combination
from opd.shaping import Shaper
from opd.teachers import LiveTeacher, answers_of, reasons, unanswered
from opd.trajectories import Trajectories
from opd.updates import Optimiser
from opd.verifiers import Scorer


class Monitoring(Protocol):
    """What a person sees of a run (`opd.monitor`)."""

    console: Console
    stop_requested: bool
    stopped_by: int | None
    ended_by: str | None
    before: HeldOut | None
    after: HeldOut | None
    history: list[dict[str, float]]
    seconds: float

    def begin(self, run: Run) -> dict[str, float]: ...

    def after_step(self, run: Run, signals: dict[str, float], measurement: Measurement) -> dict[str, float]: ...

    def end(self, run: Run) -> dict[str, float]: ...

    def raise_failed(self, run: Run) -> None: ...

    def held_out_at(self, step: int) -> dict[str, float]: ...

    def record(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def status(self, text: str) -> AbstractContextManager[None]: ...

    def warn(self, text: str) -> None: ...

    def warn_once(self, text: str) -> None: ...


class Keeping(Protocol):
    """What writes the state of a run (`opd.checkpoints`)."""

    written: int | None

    def facts(self, run: Run) -> dict[str, Any]: ...

    def after_step(self, run: Run) -> None: ...

    def write(self, run: Run, again: bool = False) -> None: ...


class Counting(Protocol):
    """What counts the steps of a run that were not taken (`opd.failures`)."""

    total: int
    empty: int

    def after_step(self, run: Run) -> None: ...


class Watching(Protocol):
    """What reads the evaluations of a run (`opd.stopping`)."""

    ended_by: str | None
    alarms: list[str]

    def read(self, run: Run, step: int, measured: Mapping[str, float]) -> None: ...


@dataclass
class Run:
    """Everything that the loop touches, one attribute an axis."""

    recipe: Recipe
    context: Context
    accelerator: Accelerator
    student: Student
    teachers: list[LiveTeacher]
    course: Course
    kept: KeptWeights
    rollout: PrefixSource
    verifier: Scorer | None
    shaping: list[Shaper]
    optimiser: Optimiser
    held_out: list[Prompt]
    monitor: Monitoring
    checkpoints: Keeping
    skips: Counting
    watch: Watching
    micro: int
    step: int = 0
    signals: dict[str, float] = field(default_factory=dict)

    def parts(self, able_to: str) -> Iterator[tuple[str, Any]]:
        """`(name, part)` of everything in the run that has a method of that name; one item of a list is one part, and
        so is each source of a combined rollout."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            items = {f"{entry.name}.{i}": item for i, item in enumerate(value)} if isinstance(value, list) else None
            for name, part in (items or {entry.name: value}).items():
                yield from _able(name, part, able_to)

    def close(self) -> None:
        """Leave nothing behind that goes on: threads, connections, weights that were sent."""
        with ExitStack() as parts:
            for _, part in self.parts("close"):
                parts.callback(part.close)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on: a part that has `state_dict` is in it. Every process must ask; of weights
        that are sharded, the main process alone gets the whole."""
        return {
            "step": self.step,
            "signals": self.signals,
            "micro": self.micro,
            "random": gather_object([random_state(self.accelerator.device)]),
            "parts": {
                name: sharding.gathered(part.state_dict(), self.accelerator.is_main_process)
                for name, part in self.parts("state_dict")
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`, on a run that was just assembled.

        Raises:
            RunError: a part that the state does not fit, by name.
        """
        parts, stored = dict(self.parts("state_dict")), state["parts"]
        for name in dict.fromkeys([*parts, *stored]):
            if name in parts and name not in stored and not parts[name].state_dict():
                continue
            if name not in parts and not stored[name]:
                continue
            if name not in parts or name not in stored:
                side = "checkpoint" if name not in stored else "recipe"
                raise RunError(f"the checkpoint does not fit: {name} has a state, but not in the {side}")
            try:
                parts[name].load_state_dict(stored[name])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise RunError(f"the checkpoint does not fit: {name} cannot take its state ({error})") from None
        self.step, self.signals, self.micro = state["step"], state["signals"], state["micro"]
        randoms = state["random"]
        set_random_state(randoms[self.accelerator.process_index % len(randoms)], self.accelerator.device)

    def at(self, step: int) -> Now:
        """The recipe and the facts of a step (from 0), for all that takes part in it."""
        return Now.at(self.recipe, self.context, step)

    def sampler(self, now: Now) -> HeldOutSampler:
        """Who writes when the student is measured."""
        return held_out_sampler(self.student, self.rollout, now)

    def ask(self, trajectories: Trajectories, now: Now) -> list[Target]:
        """Every teacher's answers; where they came with the trajectories they are read.

        Raises:
            IncompatibleError: an answer came whose teacher is none of the recipe's, or could be several.
        """
        names = [settings.name for settings in now.recipe.teacher]
        for target in trajectories.answers or ():
            if names.count(target.teacher) != 1:
                raise IncompatibleError(
                    f"the rollout brought an answer of teacher {target.teacher!r}, and the recipe's teachers are "
                    f"called {names}; name each answer after one of them, and each of several teachers"
                )
        pairs = zip(self.teachers, now.recipe.teacher, strict=True)
        return [target for t, settings in pairs for target in answers_of(t, trajectories, settings, now.context)]

    def written(self, trajectories: Trajectories, measurement: Measurement) -> Trajectories:
        """The trajectories that could be written; the others are in nothing of the step that comes after.

        Raises:
            RunError: as `answered`.
        """
        lost = torch.zeros(len(trajectories), dtype=torch.bool) if trajectories.lost is None else trajectories.lost
        self._any_lost(lost, trajectories, measurement)
        return trajectories.written()

    def answered(
        self, trajectories: Trajectories, targets: Sequence[Target], measurement: Measurement
    ) -> tuple[Trajectories, list[Target]]:
        """The trajectories that every teacher answered, with the answers. The others are in nothing of the step that
        comes after: no loss and no denominator, no average, no comparison within a group.

        Raises:
            RunError: a process of several has none left, or with sharded weights fewer than others: it cannot take part
                in the others' passes.
        """
        lost = unanswered(trajectories, targets)
        if not self._any_lost(lost, trajectories, measurement):
            return trajectories, list(targets)
        kept, here = trajectories.pick((~lost).nonzero().flatten().tolist())
        if kept.rewards is not None and len(kept):
            kept = kept.rewarded(kept.rewards, self._spread(kept))
        return kept, [replace(target.select(here.to(self.context.device)), missing=None) for target in targets]

    def _any_lost(self, lost: torch.Tensor, trajectories: Trajectories, measurement: Measurement) -> bool:
        """Whether some process's `lost`, bool `[B]` here, are any; raises as `answered` does."""
        count = float(self.sum_over_processes(lost.sum().double()))
        if not count:
            return False
        drawn = float(self.sum_over_processes(torch.tensor(float(len(lost)), dtype=torch.float64)))
        measurement.lost(count / drawn, trajectories, lost)
        none_left = float(self.sum_over_processes(lost.all().double()))
        processes = self.accelerator.num_processes
        if processes > 1 and (none_left or self.accelerator.is_fsdp2):
            why = self.reasons(gather_object)
            raise RunError(
                f"{count:g} of {drawn:g} rollouts were lost ({why}), and "
                f"{'a process has none left' if none_left else 'with FSDP2 every process needs equally many'}: mend "
                f"what failed and go on with {RESUME}"
            )
        return True

    def reasons(self, gather: Callable[[list[Mapping[str, int]]], list[Mapping[str, int]]] = list) -> str:
        """Why rollouts were lost so far, the commonest reason first; with `gather` on any process, and all must ask."""
        return reasons([*self.teachers, self.rollout], gather)

    def share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """This process's part of a step's prompts."""
        return list(prompts[self.accelerator.process_index :: self.accelerator.num_processes])

    def begin_next(self, draw: Draw) -> None:
        """Have the rollout begin what the step after this one will ask it for, as far as that is known: what the
        curriculum would draw if this step measured what the last one did, with no question to anybody. When the draw
        comes out otherwise, what was begun is not used."""
        step = self.step + 1
        if not self.rollout.ahead or step >= self.recipe.steps:
            return
        before = copy.deepcopy(self.course.state_dict())
        try:
            following = self.course.next(step, Foreseen(self.signals | draw.signals), NobodyToAsk())
        except MustAskError:
            following = None
        finally:
            self.course.load_state_dict(before)
        if following is not None and following.prompts:
            request = self.at(step).request(count_repeats(following.prompts), following.budget, stream=step)
            self.rollout.begin(replace(request, prompts=self.share_of_draw(request.prompts)))

    def share_of_draw(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """This process's part of prompts that all processes work on together.

        Raises:
            RunError: there are too few for that, or with sharded weights not equally many for each.
        """
        processes = self.accelerator.num_processes
        if len(prompts) < processes or (len(prompts) % processes and self.accelerator.is_fsdp2):
            equally = ", and with FSDP2 as many as the others" if self.accelerator.is_fsdp2 else ""
            raise RunError(
                f"the curriculum names {len(prompts)} prompts, and each of the {processes} processes needs one"
                f"{equally}; name more, or run fewer processes"
            )
        return self.share(prompts)

    @property
    def expected(self) -> int | None:
        """Trajectories of a step in expectation, where the update divides by them."""
        return self.recipe.batch.prompts * self.recipe.batch.group if self.optimiser.expected else None

    def gather(self, trajectories: Trajectories, numbers: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` numbers of this process's trajectories, and on every process those of all, in the order of the
        prompts that were shared out."""
        groups, sizes = torch.unique_consecutive(trajectories.groups, return_counts=True)
        parts = torch.split(numbers.detach().cpu(), sizes.tolist())
        # A process may have lost a whole group, so places are told by the groups' numbers.
        of_processes = gather_object([list(zip(groups.tolist(), parts, strict=True))])
        of_all = [(group, i, part) for i, mine in enumerate(of_processes) for group, part in mine]
        return torch.cat([part for _, _, part in sorted(of_all, key=lambda each: each[:2])])

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum")

    @property
    def shows_alternatives(self) -> bool:
        """Whether this process leaves, of some steps, what both sides would rather have said: it writes rollouts, and
        holds the student's weights whole while gradients are made."""
        return self.optimiser.writes_rollouts and self.student.skeleton is None and self.accelerator.is_main_process

    def stop_requested(self) -> bool:
        """Whether a signal asked any process to stop; all get the same answer, so that none waits for the others."""
        return bool(self.sum_over_processes(torch.tensor([float(self.monitor.stop_requested)])).item())

    def verify(self, trajectories: Trajectories) -> Trajectories:
        """A step's trajectories with their rewards, as `judged` gives them, compared over all processes, which must all
        ask."""
        judged = self.judged(trajectories)
        return judged if judged.rewards is None else judged.rewarded(judged.rewards, self._spread(judged))

    def judged(self, trajectories: Trajectories) -> Trajectories:
        """The trajectories with their rewards, compared among themselves: the verifier's verdicts, and where there is
        none what the rollout gave; NaN where neither did. Without rewards when the recipe has no verifier and the
        rollout sets none. A process without trajectories need not ask."""
        own = trajectories.rewards
        if self.verifier is None and own is None:
            return trajectories
        rewards = own
        if self.verifier is not None:
            rewards = self.verifier.score(trajectories, self.student.outcomes(trajectories))
            rewards = rewards if own is None else torch.where(rewards.isnan(), own, rewards)
        assert rewards is not None
        return trajectories.rewarded(rewards, spread_of(sums_of(rewards, trajectories.shares(rewards))))

    def measured(self, trajectories: Trajectories) -> dict[str, torch.Tensor]:
        """What the verifier says of outcomes beside their rewards, for held-out measurements."""
        if self.verifier is None:
            return {}
        return self.verifier.measure(trajectories, self.student.outcomes(trajectories))

    def _spread(self, trajectories: Trajectories) -> float:
        rewards = trajectories.rewards
        assert rewards is not None
        return spread_of(self.sum_over_processes(sums_of(rewards, trajectories.shares(rewards))))


def sums_of(rewards: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """float64 `[3]`: the sum of the known rewards, that of their squares, and their number, each by its share of an
    outcome (`Trajectories.shares`)."""
    known = ~rewards.isnan()
    values, counted = rewards[known].double(), shares[known].double()
    return torch.stack([(values * counted).sum(), (values.square() * counted).sum(), counted.sum()])


def spread_of(sums: torch.Tensor) -> float:
    """The standard deviation that `sums_of` some rewards say; 0 of none."""
    total, squares, count = sums.tolist()
    return max(0.0, squares / count - (total / count) ** 2) ** 0.5 if count else 0.0


def _able(name: str, part: Any, able_to: str) -> Iterator[tuple[str, Any]]:
    if hasattr(part, able_to):
        yield name, part
    for i, source in enumerate(part.sources if isinstance(part, Combination) else ()):
        yield from _able(f"{name}.{i}", source, able_to)


def held_out_sampler(student: Student, rollout: PrefixSource, now: Now) -> HeldOutSampler:
    """The rollout's own sampler for measurements of the student, under the recipe's settings for them."""
    sampler = rollout.held_out(now.recipe.rollout, now.context, student)
    return student.measured_by(sampler, now.recipe.evaluation)
