"""What a curriculum may ask of a run before it says what comes next, answered by the run's own parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch

from opd.curricula import Asker
from opd.distributions import Categorical, Gaussian, Sampled, Target
from opd.errors import RESUME, RunError
from opd.measurement import Clock
from opd.prompts import Prompt, count_repeats
from opd.rollouts import HeldOutSampler, Rollout
from opd.teachers import unanswered
from opd.trajectories import AUTHORS, Trajectories

if TYPE_CHECKING:
    from opd.now import Now
    from opd.run import Run


class RunAsker(Asker):
    """The built parts of a run, before the step whose draw is wanted; `tokens` are what they wrote and scored."""

    def __init__(self, run: Run, clock: Clock):
        self.run, self.clock = run, clock
        self.tokens: dict[str, float] = {}

    @functools.cached_property
    def now(self) -> Now:
        """Temperatures and the like are those of the step that comes."""
        return self.run.at(min(self.run.step, self.run.recipe.steps - 1))

    @torch.no_grad()
    def roll_out(
        self, prompts: Sequence[Prompt], group: int = 1, budget: int | None = None, by: Rollout | None = None
    ) -> Trajectories:
        run, now = self.run, self.now
        with self.clock("curriculum"):
            mine = run.share_of_draw(count_repeats(prompts))
            with ExitStack() as opened:
                if by is None:
                    sampler, most = run.sampler(now), now.recipe.rollout.budget
                else:
                    by = by.at(run.step, run.recipe.steps)
                    source = by.build(now.context, run.student, run.teachers)
                    opened.callback(source.close)
                    sampler, most = HeldOutSampler(source, by, now.context), by.budget
                # Streams from 0 are those of training, and -1 is that of evaluations.
                made = run.verify(sampler(mine, group, most if budget is None else budget, stream=-2 - run.step))
            if len(made) < len(mine) * group:
                raise RunError(
                    f"the curriculum has rollouts written and some were lost ({run.reasons()}): mend what failed and "
                    f"go on with {RESUME}"
                )
            self._count("sampled_tokens", float((made.authors != AUTHORS.index("data")).sum()))
            return made

    @torch.no_grad()
    def ask(self, trajectories: Trajectories) -> list[Target]:
        with self.clock("curriculum"), self.run.accelerator.autocast():
            answers = self.run.ask(trajectories, self.now)
            if bool(unanswered(trajectories, answers).any()):
                raise RunError(
                    f"the curriculum asks the teachers and they did not answer ({self.run.reasons()}): mend "
                    f"what failed and go on with {RESUME}"
                )
            self._count("teacher_tokens", sum(t.voices * t.asked for t in self.run.teachers) * trajectories.positions)
            return answers

    @torch.no_grad()
    def log_probs(self, trajectories: Trajectories) -> torch.Tensor:
        run, found = self.run, []
        with self.clock("curriculum"), run.accelerator.autocast():
            training = run.student.module.training
            run.student.module.eval()
            for micro, _ in trajectories.split(run.micro):
                own = run.student(micro, self.now.context)
                assert isinstance(own, Categorical | Gaussian)
                of_actions = own.log_prob if isinstance(own, Gaussian) else lambda a, o=own: Sampled.of(o, a).log_probs
                found.append(of_actions(micro.actions).float())
            run.student.module.train(training)
        return torch.cat(found)

    def gather(self, trajectories: Trajectories, numbers: torch.Tensor) -> torch.Tensor:
        return self.run.gather(trajectories, numbers)

    def working(self, text: str) -> AbstractContextManager[None]:
        return self.run.monitor.status(text)

    def stop_requested(self) -> bool:
        return self.run.stop_requested()

    def save(self) -> None:
        self.run.checkpoints.write(self.run, again=True)

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.run.monitor.record(self.run, rows)

    def keep_weights(self) -> None:
        self.run.kept.keep()

    def restore_weights(self) -> bool:
        return self.run.kept.restore()

    def _count(self, name: str, tokens: float) -> None:
        self.tokens[name] = self.tokens.get(name, 0.0) + tokens
