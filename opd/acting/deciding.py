"""Who decides: whoever gives a distribution over the tokens of a chunk, at states that somebody visited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from opd.acting.episode import Episode
from opd.acting.model import ActionModel
from opd.acting.seeing import Plan, Seen, Statistics
from opd.distributions import Categorical, Head, Vocabulary
from opd.errors import IncompatibleError

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


@dataclass(frozen=True)
class State:
    """One state to decide in."""

    instruction: str
    seen: Seen
    plan: Plan | None = None


def states_of(episodes: Sequence[Episode]) -> list[State]:
    """All decisions of all episodes, in order."""
    return [
        State(episode.instruction, seen, None if episode.plans is None else episode.plans[i])
        for episode in episodes
        for i, seen in enumerate(episode.seen)
    ]


class Actor(ABC):
    """Whoever can be asked for a chunk of actions."""

    plans: ClassVar[bool] = False
    """Whether it reads what the environment's own expert plans."""

    @property
    @abstractmethod
    def statistics(self) -> Statistics:
        """What its tokens mean in the environment's units."""

    @abstractmethod
    def believe(self, states: Sequence[State], temperature: float) -> Categorical:
        """Distributions over the K action ids at the M tokens of each of B states, `[B * M]` in all."""


class PolicyActor(Actor):
    """A policy over action tokens.

    Args:
        model: `module` without what processes wrap around it.
        module: what is called; it has a graph when gradients are on.
    """

    def __init__(self, model: ActionModel, module: torch.nn.Module | None = None):
        self.model, self.module = model, module or model

    @property
    def statistics(self) -> Statistics:
        return self.model.statistics

    def believe(self, states: Sequence[State], temperature: float) -> Categorical:
        words = {text: self.model.words(text) for text in dict.fromkeys(state.instruction for state in states)}
        hidden = self.module([state.seen for state in states], [words[state.instruction] for state in states])
        return Categorical(hidden.flatten(0, 1), self.model.head(temperature))

    def in_batches(self, states: Sequence[State], temperature: float, size: int) -> Categorical:
        """The same, a few states at a time."""
        parts = [self.believe(states[i : i + size], temperature) for i in range(0, len(states), size)]
        if not parts:
            return Categorical(torch.zeros(0, self.model.layout.width), self.model.head(temperature))
        return Categorical(torch.cat([part.hidden for part in parts]), parts[0].head)


class ScriptedActor(Actor):
    """The environment's own expert: a Gaussian round what it plans, cut into the student's bins. Its temperature is 1:
    how sure it is, the environment says."""

    plans = True

    def __init__(self, model: ActionModel):
        self.model = model

    @property
    def statistics(self) -> Statistics:
        return self.model.statistics

    def believe(self, states: Sequence[State], temperature: float) -> Categorical:
        layout, statistics = self.model.layout, self.model.statistics
        plans = [state.plan for state in states if state.plan is not None]
        if len(plans) < len(states):
            raise IncompatibleError(
                "the scripted expert answers at states of a simulator alone; take rollout 'simulator' "
                "with an environment that has an expert, or a teacher of kind policy"
            )
        vocabulary = self.model.vocabulary
        if plans:
            mean = np.stack([plan.mean for plan in plans])
            # How far a spread reaches once actions are scaled.
            width = np.stack([plan.spread for plan in plans]) / _units(statistics)
            log_probs = layout.actions.log_probs(statistics.scale(mean), np.maximum(width, 1e-6))
            hidden = torch.from_numpy(log_probs).flatten(0, -2)
        else:
            hidden = torch.zeros(0, layout.bins)
        return Categorical(hidden.to(self.model.device), _identity(vocabulary, self.model.device))


def _units(statistics: Statistics) -> np.ndarray:
    """float64 `[A]`: how much of the environment's units one of a scaled action is."""
    half = (np.array(statistics.high) - np.array(statistics.low)) / 2
    return np.where(statistics.scaled, half, 1.0)


def _identity(vocabulary: Vocabulary, device: torch.device) -> Head:
    """A head that leaves log-probabilities as they are."""
    return Head(torch.eye(vocabulary.width(0), device=device), vocabulary=vocabulary)


def draw(belief: Categorical, tokens: int, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, log_probs)`, both `[B, M]`, of chunks drawn from distributions at `[B * M]`.

    Args:
        tokens: M.
        noise: float64 `[B, M]` in 0..1, one number a draw; None takes the likeliest.
    """
    log_probs = belief.log_probs()
    if noise is None:
        columns = log_probs.argmax(-1)
    else:
        below = log_probs.double().exp().cumsum(-1)
        # What the sum misses of 1 belongs to nobody.
        wanted = noise.flatten()[:, None].to(below.device) * below[:, -1:]
        columns = (below <= wanted).sum(-1).clamp(max=below.shape[1] - 1)
    taken = log_probs.gather(1, columns[:, None]).squeeze(1)
    ids = belief.vocabulary.named(columns)
    return ids.view(-1, tokens).cpu(), taken.float().view(-1, tokens).cpu()


def actor_of(part: Student | LiveTeacher, which: str) -> Actor:
    """Who decides for a built student or teacher; `which` names it.

    Raises:
        IncompatibleError: it decides nothing.
    """
    found = getattr(part, "actor", None)
    if not isinstance(found, Actor):
        raise IncompatibleError(
            f"{which} ({type(part).__name__}) cannot act; take a student of kind action_tokens and a teacher of kind "
            "policy, scripted or self"
        )
    return found
