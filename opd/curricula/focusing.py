"""Prompts on which the teacher is right and the student is not (teacher-validated disagreement focusing, Video-OPD)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from opd.choice import OneOf
from opd.context import Context
from opd.curricula import sampling
from opd.curricula.base import Asker, Course, Curriculum, Draw
from opd.distributions import Categorical, Gaussian, Sampled, Target, spans_in
from opd.distributions.routed import Routed
from opd.errors import DataError, IncompatibleError, RunError
from opd.prompts import Prompt
from opd.reduction import sums_by_trajectory
from opd.rollouts.base import Rollout
from opd.rollouts.teacher import TeacherRollout
from opd.trajectories import Trajectories

BLOCK = 8
"""Prompts that are answered together, as a multiple of a step's."""
ROUNDING = 1e-6
"""Of a mean of rewards in float32, which may lie that far below what it is on paper."""

OF_SAMPLERS = {"buckets": ("buckets",), "gaussian": ("peak", "width")}
"""Settings that one sampler alone reads."""


class Focusing(Curriculum):
    """Works in rounds. At the first one's start the first teacher answers every prompt, and a prompt is reliable where
    its mean reward is `reliable_from` or more. At each one's start the student, as it is then, answers the reliable
    ones; of these `size` are taken by how much teacher and student disagree, shuffled and trained on `epochs` times.
    Then another round begins, as long as there are steps; what was taken before may be taken again.

    Verdicts choose prompts and enter no loss. Prompts without a verdict are never taken. What is scored already is in
    checkpoints: a run that is asked to stop while prompts are scored goes on with the rest.
    """

    kind: Literal["focusing"] = "focusing"
    needs_reward: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("curriculum/round",)
    size: int = Field(ge=1, description="Prompts of a round")
    epochs: int = Field(1, ge=1, description="How often a round goes through its prompts")
    responses: int = Field(4, ge=1, description="Answers of each side to a prompt, whose rewards are averaged")
    reliable_from: float = Field(
        0.7, ge=0, le=1, description="Least mean reward of the teacher's answers to a prompt; 0 takes out none"
    )
    disagreement: Literal["reward_gap", "reverse_kl"] = Field(
        "reward_gap",
        description="The teacher's mean reward less the student's, or log q - log p summed over each of the student's "
        "answers",
    )
    sampler: Literal["top", "even_ranks", "buckets", "gaussian", "random"] = Field(
        "top",
        description="Which are taken, by disagreement: the largest (Top-k); ranks at even distances (DSUS); evenly "
        "from equally wide ranges (BBDS); by a Gaussian weight (GWDS); or any, for which the student is not asked",
    )
    buckets: int = Field(5, ge=1, description="Ranges of the sampler buckets")
    peak: float = Field(0.9, description="Disagreement with the largest weight of the sampler gaussian")
    width: float = Field(0.2, gt=0, description="Its standard deviation")
    teacher: Annotated[Rollout, OneOf(Rollout, "teacher")] = Field(
        TeacherRollout(), description="Who writes the teacher's answers; {kind: teacher, top_k: 1} is greedy"
    )
    student: Annotated[Rollout, OneOf(Rollout, "student")] | None = Field(
        None, description="Who writes the student's; default as answers to held-out prompts are"
    )
    save_every: int = Field(
        10_000,
        ge=0,
        description="Prompts scored between checkpoints while prompts are scored; 0 when it is stopped only",
    )

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Focusing:
        for sampler, names in OF_SAMPLERS.items():
            for name in names:
                if self.sampler != sampler and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} is read by sampler {sampler!r}, and sampler is {self.sampler!r}; remove it"
                    )
        if self.sampler == "random" and (self.student is not None or self.disagreement != "reward_gap"):
            raise ValueError("sampler 'random' looks at no disagreement; remove student and disagreement")
        return self

    @property
    def rollouts(self) -> list[Rollout]:
        return [self.teacher] if self.student is None else [self.teacher, self.student]

    def build(self, prompts: Sequence[Prompt], per_step: int, context: Context) -> FocusingCourse:
        if self.size > len(prompts):
            raise DataError(
                f"curriculum.size is {self.size} and there are {len(prompts)} training prompts; take at most these"
            )
        return FocusingCourse(self, prompts, per_step, context)

    def choose(self, scores: Sequence[float], rng: random.Random) -> list[int]:
        """Indices of those that are taken, at most `size`."""
        if self.sampler == "top":
            return sampling.top(scores, self.size)
        if self.sampler == "even_ranks":
            return sampling.even_ranks(scores, self.size)
        if self.sampler == "buckets":
            return sampling.buckets(scores, self.size, self.buckets)
        if self.sampler == "gaussian":
            return sampling.gaussian(scores, self.size, self.peak, self.width, rng)
        return rng.sample(range(len(scores)), min(self.size, len(scores)))


class FocusingCourse(Course):
    """A built curriculum.

    Attributes:
        round: from 1; 0 before the first.
        taught: mean reward of the teacher by prompt id, None without a verdict.
        own: the same of the student in the round that is being scored, and its disagreement with the teacher.
        order: ids of the round in the order of training, `done` of which were drawn.
    """

    def __init__(self, settings: Focusing, prompts: Sequence[Prompt], per_step: int, context: Context):
        self.settings, self.per_step = settings, per_step
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.seed, self.steps = context.seed, context.steps
        self.round = self.done = 0
        self.taught: dict[str, float | None] = {}
        self.own: dict[str, tuple[float | None, float | None]] = {}
        self.order: list[str] = []

    def next(self, step: int, signals: Mapping[str, float], asker: Asker) -> Draw | None:
        found: dict[str, float] = {}
        if step >= self.steps:
            return Draw([])
        if self.done >= len(self.order):
            if not self._scored(asker):
                return None
            found = self._begin(asker)
        # The last step of a round is filled up, so that all have equally many.
        drawn = [self.order[i % len(self.order)] for i in range(self.done, self.done + self.per_step)]
        self.done += self.per_step
        return Draw([self.prompts[each] for each in drawn], signals={**found, "curriculum/round": float(self.round)})

    # -- scores --------------------------------------------------------------------------------------------------------

    def _scored(self, asker: Asker) -> bool:
        """Score what is not scored yet; False when somebody asked the run to stop meanwhile."""
        since = 0
        for block in self._blocks([each for each in self.prompts if each not in self.taught]):
            made = self._answers(asker, block, "the teacher answers", self.settings.teacher)
            self.taught |= self._rewards(asker, made, block)
            since += len(block)
            if self._leave(asker):
                return False
            since = self._saved(asker, since)
        reliable = self._reliable()
        if not reliable:
            best = max((reward for reward in self.taught.values() if reward is not None), default=None)
            told = "none got a verdict" if best is None else f"the best mean reward is {best:.3g}"
            raise RunError(
                f"curriculum focusing: the teacher is reliable on none of {len(self.prompts)} prompts ({told}, and "
                f"reliable_from is {self.settings.reliable_from:g}); lower it, or take another teacher"
            )
        if self.settings.sampler == "random":
            return True
        for block in self._blocks([each for each in reliable if each not in self.own]):
            made = self._answers(asker, block, "the student answers", self.settings.student)
            rewards = self._rewards(asker, made, block)
            if self.settings.disagreement == "reverse_kl":
                gaps = self._of_blocks(asker, made, self._log_ratios(asker, made), block)
            else:
                gaps = {each: _less(self.taught[each], rewards[each]) for each in block}
            self.own |= {each: (rewards[each], gaps[each]) for each in block}
            since += len(block)
            if self._leave(asker):
                return False
            since = self._saved(asker, since)
        return True

    def _blocks(self, names: Sequence[str]) -> list[list[str]]:
        size = BLOCK * self.per_step
        return [list(names[start : start + size]) for start in range(0, len(names), size)]

    def _answers(self, asker: Asker, block: Sequence[str], what: str, by: Rollout | None) -> Trajectories:
        scored = len(self.taught) if by is self.settings.teacher else len(self.own)
        all_of = len(self.prompts) if by is self.settings.teacher else len(self._reliable())
        # Filled up to whole steps, which processes can share; what a repeated prompt comes to is not looked at.
        filled = [block[i % len(block)] for i in range(-(-len(block) // self.per_step) * self.per_step)]
        with asker.working(
            f"curriculum focusing, round {self.round + 1}: {what} prompts {scored + 1} to {scored + len(block)} of "
            f"{all_of}, {self.settings.responses} times each"
        ):
            return asker.roll_out([self.prompts[each] for each in filled], self.settings.responses, by=by)

    def _rewards(self, asker: Asker, made: Trajectories, block: Sequence[str]) -> dict[str, float | None]:
        rewards = torch.full((len(made),), torch.nan) if made.rewards is None else made.rewards
        return self._of_blocks(asker, made, rewards, block)

    def _of_blocks(
        self, asker: Asker, made: Trajectories, numbers: torch.Tensor, block: Sequence[str]
    ) -> dict[str, float | None]:
        """Mean over each prompt's answers of `[B]` numbers of this process's trajectories; None where none is known."""
        of_prompts = asker.gather(made, numbers).view(-1, self.settings.responses).double().nanmean(1)
        return {each: None if mean != mean else float(mean) for each, mean in zip(block, of_prompts, strict=False)}

    def _log_ratios(self, asker: Asker, made: Trajectories) -> torch.Tensor:
        """float32 `[B]`: log q - log p summed over each answer of the student, `Trajectories.learn` or not."""
        targets = asker.ask(made)
        if len(targets) != 1:
            raise IncompatibleError(
                f"curriculum focusing compares the student with one teacher's answer, and there are {len(targets)}; "
                "take one teacher, or disagreement: reward_gap"
            )
        log_p = _log_probs(targets[0], made.actions)
        return sums_by_trajectory(asker.log_probs(made) - log_p.to(made.actions.device), made.lengths).cpu()

    def _leave(self, asker: Asker) -> bool:
        if not asker.stop_requested():
            return False
        asker.save()
        return True

    def _saved(self, asker: Asker, since: int) -> int:
        """How many were scored since the last checkpoint, after writing one where it is time."""
        if not self.settings.save_every or since < self.settings.save_every:
            return since
        asker.save()
        return 0

    def _reliable(self) -> list[str]:
        least = self.settings.reliable_from - ROUNDING
        return [each for each in self.prompts if (known := self.taught.get(each)) is not None and known >= least]

    # -- a round -------------------------------------------------------------------------------------------------------

    def _begin(self, asker: Asker) -> dict[str, float]:
        """Choose the prompts of the next round; what is logged of it."""
        self.round += 1
        rng = random.Random(f"focusing/{self.seed}/{self.round}")
        reliable = self._reliable()
        known = [each for each in reliable if self.settings.sampler == "random" or self.own[each][1] is not None]
        scores = [self.own[each][1] or 0.0 if each in self.own else 0.0 for each in known]
        taken = [known[i] for i in self.settings.choose(scores, rng)]
        self.order, self.done = [], 0
        for _ in range(self.settings.epochs):
            rng.shuffle(taken)
            self.order += taken
        chosen, right = set(taken), set(reliable)
        rows: list[dict[str, Any]] = []
        for each in self.prompts:
            reward, gap = self.own.get(each, (None, None))
            row = {"round": self.round, "id": each, "reliability": self.taught[each], "student": reward}
            rows.append({**row, "disagreement": gap, "reliable": each in right, "drawn": each in chosen})
        asker.record(rows)
        self.own = {}
        judged = [reward for reward in self.taught.values() if reward is not None]
        found = {
            "judged": float(len(judged)),
            "reliable": len(reliable) / len(judged),
            "drawn": float(len(taken)),
            "reliability": _mean([self.taught[each] for each in taken]),
            "disagreement": _mean([row["disagreement"] for row in rows if row["drawn"]]),
            "student": _mean([row["student"] for row in rows if row["drawn"]]),
        }
        return {f"curriculum/{name}": value for name, value in found.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        if not self.taught:
            return {}
        own = {each: list(pair) for each, pair in self.own.items()}
        return {"round": self.round, "done": self.done, "taught": dict(self.taught), "own": own, "order": [*self.order]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            self.round = self.done = 0
            self.taught, self.own, self.order = {}, {}, []
            return
        self.round, self.done, self.order = state["round"], state["done"], list(state["order"])
        self.taught = dict(state["taught"])
        self.own = {each: (reward, gap) for each, (reward, gap) in state["own"].items()}
        if lost := next((each for each in self.order if each not in self.prompts), None):
            raise ValueError(f"it draws prompt {lost!r}, which the prompt set does not have")


def _log_probs(target: Target, actions: torch.Tensor) -> torch.Tensor:
    """float32 `[N]` of what a teacher says of the actions taken."""
    said = target.distribution
    if isinstance(said, Gaussian):
        return said.log_prob(actions)
    if not isinstance(said, Categorical | Routed | Sampled) or spans_in(said) is not None:
        raise IncompatibleError(
            "curriculum focusing with disagreement: reverse_kl needs the log-probability of each action, and the "
            f"teacher answers {said.kind!r}; take disagreement: reward_gap, or a teacher in this process"
        )
    return Sampled.of(said, actions).log_probs


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
