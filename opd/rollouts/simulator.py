"""Rollouts in simulators: whoever acts plays episodes, chunk by chunk, and the student learns on the states it saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from opd.acting.deciding import Actor, PolicyActor, State, actor_of, draw
from opd.acting.episode import Episode, Played, pack
from opd.acting.layout import Layout
from opd.acting.model import policy_of
from opd.acting.seeing import Plan, Seen
from opd.choice import Settings, kind_of
from opd.context import Context
from opd.environments.arena import Arena
from opd.environments.control import Chunk, Control, ControlOrder
from opd.environments.rows import body_of, repeats, start_of
from opd.errors import DataError, IncompatibleError, nearest
from opd.prompts import Prompt
from opd.rollouts.base import HeldOutSampler, PrefixSource, Rollout, row_seed
from opd.rollouts.request import Request
from opd.trajectories import Author, Trajectories

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class PlayingSettings(Settings):
    """How episodes are played."""

    decisions: int = Field(64, ge=1, le=10_000, description="Most chunks of an episode that its environment lets go on")
    worlds: int = Field(
        64, ge=1, le=4096, description="Episodes side by side; their states are one batch of the policy"
    )
    processes: int = Field(
        0, ge=0, le=256, description="That simulate; 0 in this one, where a world that hangs hangs the run"
    )
    patience: float = Field(60.0, gt=0, description="Seconds for a chunk before a process counts as hanging")
    greedy: bool = Field(False, description="Act by the likeliest token instead of drawing")
    frames: bool = Field(False, description="Keep a picture of each step for the report; held-out episodes have them")


class SimulatorRollout(PlayingSettings, Rollout):
    """Episodes of the rows' environments: at each decision a chunk of H actions is drawn and played open loop. Tokens
    of actions behind the end of an episode are not learnt from, and the reward is the outcome.

    Prompts of kind `episodes` say where. A world that crashes or hangs costs its episode, is made again and counted.
    """

    kind: Literal["simulator"] = "simulator"
    modality: ClassVar[str | None] = "action"
    teacher: str | None = Field(None, description="Name of the teacher that acts; default the student")

    @property
    def budget(self) -> int:
        return self.decisions

    @property
    def rewards(self) -> bool:
        return True

    def check_teacher(self, names: Sequence[str | None]) -> None:
        """Refuse a `teacher` that is none of the recipe's."""
        known = [name for name in names if name]
        if self.teacher is not None and self.teacher not in known:
            raise IncompatibleError(
                f"rollout.teacher is {self.teacher!r}{nearest(self.teacher, known)}; the recipe names "
                f"{known or 'none'}: give that teacher a name"
            )

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> PrefixSource:
        reader = policy_of(student, "the student")
        names = [teacher.settings.name for teacher in teachers]
        self.check_teacher(names)
        actors = [actor_of(member, "a teacher") for teacher in teachers for member in teacher.members().values()]
        plans = any(actor.plans for actor in actors)
        if self.teacher is None:
            return Simulator(PolicyActor(reader), reader.layout, self, plans=plans)
        writer = teachers[names.index(self.teacher)]
        if writer is not writer.members().get(""):
            raise IncompatibleError("rollout 'simulator' lets one teacher act, and this one is routed; name one model")
        actor = actor_of(writer, "the teacher that acts")
        return Simulator(actor, reader.layout, self, plans=plans, author="teacher")


@dataclass
class Place:
    """One episode while it is played.

    Attributes:
        index: which of the request's rows it is.
        noise: of its draws.
        state: to decide in next; None once it is over.
    """

    index: int
    environment: Control
    noise: torch.Generator
    state: State | None = None
    seen: list[Seen] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    actions: list[torch.Tensor] = field(default_factory=list)
    log_probs: list[torch.Tensor] = field(default_factory=list)
    learn: list[torch.Tensor] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    each: list[Seen] = field(default_factory=list)
    steps: int = 0
    outcome: float = 0.0
    finished: bool = False
    lost: bool = False

    def played(self, instruction: str) -> Played:
        episode = Episode(
            instruction,
            self.seen,
            self.outcome,
            self.steps,
            self.plans or None,
            np.concatenate(self.frames) if self.frames else None,
            self.each,
        )
        empty = torch.zeros(0)
        return Played(
            episode,
            torch.cat([empty.long(), *self.actions]),
            torch.cat([empty, *self.log_probs]),
            torch.cat([empty.bool(), *self.learn]),
            self.finished,
            self.lost,
        )


class Simulator(PrefixSource[PlayingSettings]):
    """The built rollout.

    Args:
        actor: who acts.
        layout: of the student, whose tokens the trajectories hold.
        plans: whether some teacher reads what the environment's expert plans; then worlds that have one are asked.
        author: who the actor is to the student.

    Attributes:
        whole: whether episodes keep the observations between decisions too, as demonstrations do.
    """

    whole: bool = False

    def __init__(
        self,
        actor: Actor,
        layout: Layout,
        settings: PlayingSettings,
        *,
        plans: bool,
        author: Author = "student",
    ):
        self.actor, self.layout, self.plans, self.author = actor, layout, plans, author
        self.authors = frozenset({author})
        self.arena = Arena[Chunk](settings.processes, settings.patience)
        self.counts: Counter[str] = Counter()
        self.played: list[Control] = []
        if isinstance(actor, PolicyActor):
            self.dtype = next(actor.model.parameters()).dtype

    def exact(self, settings: PlayingSettings) -> bool:
        return self.author == "student" and not settings.greedy

    def held_out(self, settings: PlayingSettings, context: Context, student: Student) -> HeldOutSampler:
        """The student by the settings of this rollout, whoever acts in it."""
        if self.author == "student":
            return HeldOutSampler(self, settings, context)
        own = PolicyActor(policy_of(student, "the student"))
        other = Simulator(own, self.layout, settings, plans=self.plans)
        # One set of processes serves both.
        other.arena = self.arena
        return HeldOutSampler(other, settings, context)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            environment = Control.of(prompt)
            if environment not in self.played:
                self.played.append(environment)

    @property
    def notes(self) -> Sequence[str]:
        return [
            f"environment {kind_of(environment)!r} does not say the same again from one start, so a run that is "
            "resumed goes on with other episodes"
            for environment in self.played
            if not repeats(environment)
        ]

    def failures(self) -> Mapping[str, int]:
        return self.arena.lost

    def own_signals(self) -> Mapping[str, float]:
        """Environment steps, seconds and restarts of the training episodes since it was last asked."""
        found, self.counts = self.counts, Counter()
        return {f"simulator_{name}": found[name] for name in ("steps", "seconds", "restarts")}

    def close(self) -> None:
        self.arena.close()

    @torch.no_grad()
    def __call__(self, request: Request[PlayingSettings]) -> Trajectories:
        if request.begun is not None:
            raise IncompatibleError("rollout 'simulator' cannot go on what another source began")
        members = [(prompt, g) for prompt in request.prompts for g in range(request.group)]
        seeds = [row_seed(request.context.seed, request.stream, p, request.group, g) for p, g in members]
        training = self._evaluating(True)
        rows: list[Played | None] = [None] * len(members)
        waiting = list(range(len(members)))
        places: dict[int, Place] = {}
        try:
            while waiting or places:
                free = [n for n in range(request.settings.worlds) if n not in places][: len(waiting)]
                for number in free:
                    i = waiting.pop(0)
                    noise = torch.Generator().manual_seed(seeds[i])
                    places[number] = Place(i, Control.of(members[i][0]), noise)
                self._begin([(n, places[n]) for n in free], members, seeds, request)
                self._decide([(n, place) for n, place in places.items() if place.state is not None], request)
                for number in [n for n, place in places.items() if place.state is None]:
                    place = places.pop(number)
                    rows[place.index] = place.played(str(members[place.index][0].view()))
        finally:
            self._evaluating(training)
            counts = self.arena.read()
            # Held-out episodes are of no step.
            if request.stream >= 0:
                self.counts.update(counts)
        return pack(request.prompts, request.group, [row for row in rows if row is not None], self.author)

    def _evaluating(self, wanted: bool) -> bool:
        """Put the acting model in eval mode or back; whether it has to be put back."""
        if not isinstance(self.actor, PolicyActor):
            return False
        before = not self.actor.model.training
        self.actor.model.train(not wanted)
        return before

    def _horizon(self, environment: Control) -> int:
        return self.layout.chunk if self.plans and environment.expert else 0

    def _begin(
        self,
        places: Sequence[tuple[int, Place]],
        members: Sequence[tuple[Prompt, int]],
        seeds: Sequence[int],
        request: Request[PlayingSettings],
    ) -> None:
        """Begin the episodes of places that are free."""
        orders = [
            ControlOrder(
                number,
                place.environment,
                start_of(members[place.index][0], seeds[place.index] % 2**31),
                self._horizon(place.environment),
                request.settings.frames,
            )
            for number, place in places
        ]
        for (_, place), chunk in zip(places, self.arena.play(orders), strict=True):
            self._take(place, chunk, str(members[place.index][0].view()), request)

    def _decide(self, places: Sequence[tuple[int, Place]], request: Request[PlayingSettings]) -> None:
        """One chunk for each of the places, and what comes of it."""
        if not places:
            return
        settings, moves = request.settings, self.layout.tokens
        belief = self.actor.believe([place.state for _, place in places if place.state], request.context.temperature)
        noise = None
        if not settings.greedy:
            noise = torch.stack([torch.rand(moves, generator=p.noise, dtype=torch.float64) for _, p in places])
        ids, log_probs = draw(belief, moves, noise)
        scaled = self.layout.actions.decode(ids.numpy()).reshape(-1, self.layout.chunk, self.layout.dimensions)
        actions = self.actor.statistics.unscale(scaled)
        orders = [
            ControlOrder(
                number, place.environment, action, self._horizon(place.environment), settings.frames, self.whole
            )
            for (number, place), action in zip(places, actions, strict=True)
        ]
        for i, ((_, place), chunk) in enumerate(zip(places, self.arena.play(orders), strict=True)):
            state = place.state
            assert state is not None
            place.seen.append(state.seen)
            if self.whole and chunk is not None:
                place.each += [state.seen, *chunk.seen[:-1]]
            place.plans += [] if state.plan is None else [state.plan]
            place.actions.append(ids[i])
            place.log_probs.append(log_probs[i])
            played = 0 if chunk is None else chunk.played
            place.learn.append(torch.arange(moves) < played * self.layout.dimensions)
            self._take(place, chunk, state.instruction, request)

    def _take(self, place: Place, chunk: Chunk | None, instruction: str, request: Request[PlayingSettings]) -> None:
        """Go on to what a world said, or end the episode."""
        place.state = None
        if chunk is None:
            place.lost = True
            return
        turn = chunk.turn
        place.steps += chunk.played
        place.frames += [] if chunk.frames is None else [chunk.frames]
        place.outcome, place.finished = turn.outcome, turn.done
        if not turn.over and len(place.actions) < request.budget:
            place.state = State(instruction, turn.observation, chunk.plan)


def check_body(layout: Layout, prompt: Prompt) -> None:
    """Raise `DataError` where a policy of this layout cannot act in a row's environment."""
    environment = Control.of(prompt)
    why = layout.misfit(body_of(environment))
    if why is not None:
        raise DataError(
            f"{prompt.where}: the policy does not fit environment {kind_of(environment)!r}: {why}; make it "
            "for this environment (opd create-policy)"
        )
