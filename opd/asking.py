"""What a curriculum may ask of a run before it says what comes next, answered by the run's own parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from opd.curricula import Asker
from opd.distributions import Categorical, Gaussian, Sampled, Target
from opd.measurement import Clock
from opd.prompts import Prompt, count_repeats
from opd.rollouts import Rollout
from opd.trajectories import AUTHORS, Trajectories

if TYPE_CHECKING:
    from opd.run import Run


class RunAsker(Asker):
    """The built parts of a run, before the step whose draw is wanted; `tokens` are what they wrote and scored."""

    def __init__(self, run: Run, clock: Clock):
        self.run, self.clock = run, clock
        self.tokens: dict[str, float] = {}
        self._ready = False

    @torch.no_grad()
    def roll_out(
        self, prompts: Sequence[Prompt], group: int = 1, budget: int | None = None, by: Rollout | None = None
    ) -> Trajectories:
        run = self.run
        with self.clock("curriculum"):
            self._take_settings()
            mine = run.share_of_draw(count_repeats(prompts))
            source, most = run.sampler, run.rollout.settings.budget
            if by is not None:
                by = by.at(run.step, run.recipe.steps)
                source, most = by.build(run.rollout.context, run.student, run.teachers), by.budget
            # Streams from 0 are those of training, and -1 is that of evaluations.
            made = run.verify(source(mine, group, most if budget is None else budget, stream=-2 - run.step))
            self._count("sampled_tokens", float((made.authors != AUTHORS.index("data")).sum()))
            return made

    @torch.no_grad()
    def ask(self, trajectories: Trajectories) -> list[Target]:
        with self.clock("curriculum"), self.run.accelerator.autocast():
            self._take_settings()
            answers = self.run.ask(trajectories)
            self._count("teacher_tokens", sum(t.asked for t in self.run.teachers) * trajectories.positions)
            return answers

    @torch.no_grad()
    def log_probs(self, trajectories: Trajectories) -> torch.Tensor:
        run, found = self.run, []
        with self.clock("curriculum"), run.accelerator.autocast():
            self._take_settings()
            training = run.student.module.training
            run.student.module.eval()
            for micro, _ in trajectories.split(run.micro):
                own = run.student(micro)
                assert isinstance(own, Categorical | Gaussian)
                of_actions = own.log_prob if isinstance(own, Gaussian) else lambda a, o=own: Sampled.of(o, a).log_probs
                found.append(of_actions(micro.actions).float())
            run.student.module.train(training)
        return torch.cat(found)

    def gather(self, trajectories: Trajectories, numbers: torch.Tensor) -> torch.Tensor:
        return self.run.gather(trajectories, numbers)

    def keep_weights(self) -> None:
        self.run.kept.keep()

    def restore_weights(self) -> bool:
        return self.run.kept.restore()

    def _count(self, name: str, tokens: float) -> None:
        self.tokens[name] = self.tokens.get(name, 0.0) + tokens

    def _take_settings(self) -> None:
        """Temperatures and the like are those of the step that comes."""
        if not self._ready:
            self.run.take_settings_of_step(min(self.run.step, self.run.recipe.steps - 1))
        self._ready = True
