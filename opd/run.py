"""A run: everything that the loop touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from opd import sharding
from opd.context import Context
from opd.curricula import Schedule
from opd.errors import RunError
from opd.measurement import Measurement
from opd.objectives import Objective, Target
from opd.policies import Student
from opd.policies.held_out import HeldOut
from opd.prompts import Prompt
from opd.randomness import random_state, set_random_state
from opd.recipe import Recipe
from opd.rollouts import PrefixSource
from opd.rollouts.base import Combination
from opd.shaping import Shaper, Shaping
from opd.teachers import LiveTeacher
from opd.trajectories import Trajectories
from opd.updates import Optimiser
from opd.verifiers import Verifier


class Monitoring(Protocol):
    """What a person sees of a run (`opd.monitor`)."""

    console: Console
    stop_requested: bool
    stopped_by: int | None
    before: HeldOut | None
    after: HeldOut | None
    history: list[dict[str, float]]
    seconds: float

    def begin(self, run: Run) -> dict[str, float]: ...

    def after_step(self, run: Run, signals: dict[str, float], measurement: Measurement) -> dict[str, float]: ...

    def end(self, run: Run) -> dict[str, float]: ...

    def held_out_at(self, step: int) -> dict[str, float]: ...

    def warn(self, text: str) -> None: ...

    def warn_once(self, text: str) -> None: ...


class Keeping(Protocol):
    """What writes the state of a run (`opd.checkpoints`)."""

    written: int | None

    def facts(self, run: Run) -> dict[str, Any]: ...

    def after_step(self, run: Run) -> None: ...

    def write(self, run: Run) -> None: ...


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
    schedule: Schedule
    rollout: PrefixSource
    sampler: PrefixSource
    verifier: Verifier | None
    shaping: Shaping | Shaper
    objectives: list[Objective]
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
            if name not in parts or name not in stored:
                side = "checkpoint" if name not in stored else "recipe"
                raise RunError(f"the checkpoint does not fit: {name} has a state, but not in the {side}")
            try:
                parts[name].load_state_dict(stored[name])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise RunError(f"the checkpoint does not fit: {name} cannot take its state ({error})") from None
        self.step, self.signals, self.micro = state["step"], state["signals"], state["micro"]
        randoms = state["random"]
        # A run that is at its end measures as its last step did.
        self.take_settings_of_step(max(0, self.step - 1))
        set_random_state(randoms[self.accelerator.process_index % len(randoms)], self.accelerator.device)

    def take_settings_of_step(self, step: int) -> dict[str, float]:
        """Put the numbers of a step (from 0) in the places of the recipe's schedules, in every part that reads them,
        and return them by their keys."""
        schedules = self.recipe.scheduled()
        if not schedules:
            return {}
        now = self.recipe.at(step, self.recipe.steps)
        context = self.context.with_(temperature=now.temperature)
        self.optimiser.settings, self.objectives = now.update, now.objective
        if isinstance(self.shaping, Shaping):
            self.shaping = now.shaping
        else:
            self.shaping.settings = now.shaping
        for teacher, settings in zip(self.teachers, now.teacher, strict=True):
            teacher.settings, teacher.context = settings, context
        self.student.context = context
        self.rollout.take(now.rollout, context)
        self.sampler = self.student.held_out_sampler(now, self.rollout, context)
        return {f"schedule/{key}": float(s.at(step, self.recipe.steps)) for key, s in schedules.items()}

    def ask(self, trajectories: Trajectories) -> list[Target]:
        """Every teacher's answer."""
        return [Target(t(trajectories), t.weights(trajectories), t.settings.name) for t in self.teachers]

    def share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """This process's part of a step's prompts."""
        return list(prompts[self.accelerator.process_index :: self.accelerator.num_processes])

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum")

    def stop_requested(self) -> bool:
        """Whether a signal asked any process to stop; all get the same answer, so that none waits for the others."""
        return bool(self.sum_over_processes(torch.tensor([float(self.monitor.stop_requested)])).item())

    def verify(self, trajectories: Trajectories) -> Trajectories:
        """The trajectories with their rewards (NaN where the prompt has no verdict), when the recipe has a verifier."""
        if self.verifier is None:
            return trajectories
        scores = [
            self.verifier.score(prompt, outcome)
            for prompt, outcome in zip(trajectories.prompts, self.student.outcomes(trajectories), strict=True)
        ]
        rewards = torch.tensor([float("nan") if s is None else s for s in scores])
        return trajectories.rewarded(rewards, self._spread(rewards))

    def _spread(self, rewards: torch.Tensor) -> float:
        known = rewards[~rewards.isnan()].double()
        sums = torch.stack([known.sum(), known.square().sum(), torch.tensor(len(known)).double()])
        total, squares, count = self.sum_over_processes(sums).tolist()
        return max(0.0, squares / count - (total / count) ** 2) ** 0.5 if count else 0.0


def _able(name: str, part: Any, able_to: str) -> Iterator[tuple[str, Any]]:
    if hasattr(part, able_to):
        yield name, part
    for i, source in enumerate(part.sources if isinstance(part, Combination) else ()):
        yield from _able(f"{name}.{i}", source, able_to)
