"""Language agents: the student talks to an environment turn by turn, and learns on each turn under its own context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from pydantic import Field, model_validator

from opd.choice import kind_of
from opd.context import Context
from opd.environments.arena import Arena
from opd.environments.base import Turn
from opd.environments.rows import repeats, start_of
from opd.environments.text import Exchange, TextEnvironment, TextOrder
from opd.errors import DataError, IncompatibleError, ModelError, OpdError
from opd.language.calls import Reply
from opd.language.encoding import WRITTEN, rewritten
from opd.language.engines.base import ids_of
from opd.language.engines.in_process import InProcess
from opd.language.episodes import TURN, call_message
from opd.language.positions import check_positions
from opd.language.replies import CallFormat, call_format, said
from opd.language.rollout import LanguageRollout, SamplingSettings
from opd.language.tokens import tokens_of
from opd.prompts import Prompt
from opd.prompts.messages import Messages
from opd.rollouts.base import HeldOutSampler, PrefixSource, row_seed
from opd.rollouts.request import Request
from opd.rollouts.writing import StudentWrites
from opd.trajectories import AUTHORS, Trajectories, join

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher

ENDED = ("by_itself", "by_turns", "by_context")
"""Why an episode that was played to an end is over."""


class AgentRollout(StudentWrites):
    """Episodes of text: the student reads what the environment says and replies, in words or by calling tools in its
    own template's form, until the episode is over. Each turn is a trajectory with its own context; those of an episode
    share its outcome as their reward, and it counts once where rewards are compared.

    Prompts of kind `episodes` say where. Nothing is tokenised twice: an earlier reply stands in later contexts by the
    ids that were drawn, the student's and the teachers', and what the environment says is in no loss. A world that
    crashes or hangs costs its episode, is made again and counted.
    """

    kind: Literal["agent"] = "agent"
    turnwise: ClassVar[bool] = True
    turns: int = Field(16, ge=1, le=10_000, description="Most replies in an episode that its environment lets go on")
    max_context_tokens: int = Field(
        4096,
        ge=1,
        le=10_000_000,
        description="Most tokens before a reply; an episode that has more ends, and is counted",
    )
    history: Literal["student", "data"] = Field(
        "student",
        description="Whose replies are played: the student's, or those of the environment's expert, so that the "
        "student's answer the states of the data and are not played (then there is no reward)",
    )
    rewritten: Literal["refuse", "keep"] = Field(
        "refuse",
        description="A chat template that writes an earlier turn otherwise than it stood: refuse it, or keep every "
        "turn as it stood, so that the model reads what the template alone would not write",
    )
    worlds: int = Field(64, ge=1, le=4096, description="Episodes side by side")
    processes: int = Field(
        0, ge=0, le=256, description="That environments run in; 0 in this one, where a world that hangs hangs the run"
    )
    patience: float = Field(60.0, gt=0, description="Seconds for a turn before a process counts as hanging")

    @model_validator(mode="after")
    def _nothing_ahead(self) -> Self:
        if getattr(self.engine, "overlap", False):
            raise ValueError("engine.overlap: a turn is written when the one before it was answered; leave overlap out")
        return self

    @property
    def rewards(self) -> bool:
        """Outcomes are those of the student's own replies, where these are played."""
        return self.history == "student"

    @property
    def most_turns(self) -> int:
        return self.turns

    @property
    def most_read(self) -> int | None:
        return self.max_context_tokens

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> AgentSource:
        shared = PartialState()
        if shared.distributed_type == DistributedType.FSDP:
            raise IncompatibleError(
                "rollout 'agent': processes play episodes of unequal length, and FSDP2 needs equally many passes of "
                "each; take plain data parallelism"
            )
        if self.engine is not None and not self.engine.here and shared.num_processes > 1:
            raise IncompatibleError(
                "rollout 'agent' with rollout.engine: processes play unequally many turns, and the engine needs all at "
                "once; run one process, or leave out the engine"
            )
        writer = self.writer(context, student, teachers)
        if writer.language.reads_pictures:
            raise IncompatibleError("rollout 'agent' is for students of text alone; take student.kind causal_lm")
        readers = [("the student", writer.reader)]
        for teacher in teachers:
            for route, member in teacher.members().items():
                reader = getattr(member, "language", getattr(member, "reader", None))
                if isinstance(reader, InProcess):
                    readers.append((" ".join(part for part in (_named(teacher), route) if part), reader))
        return AgentSource(writer, self, readers, teachers)


@dataclass
class Place:
    """One episode while it is played.

    Attributes:
        index: which of the request's rows it is.
        messages: all that was said, replies with their ids.
        written: `(part, row)` of each reply among what was drawn.
        told: of each turn, what logs want (`TURN`).
        contexts: the messages before each reply.
        ended: why it is over; None while it goes on.
    """

    index: int
    prompt: Prompt
    member: int
    environment: TextEnvironment
    messages: Messages = field(default_factory=list)
    expert: Reply | None = None
    written: list[tuple[int, int]] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    contexts: list[Messages] = field(default_factory=list)
    outcome: float = 0.0
    ended: str | None = None

    def seen(self, told: Mapping[str, Any] | None = None) -> Prompt:
        """What the next reply answers, as a prompt; `told` is what logs want of that turn."""
        fields = {**self.prompt.fields, **self.environment.columns(str(self.prompt.fields["task"]))}
        fields |= {self.prompt.column: list(self.messages), **({} if told is None else {TURN: told})}
        return replace(self.prompt, fields=fields)


class AgentSource(PrefixSource[AgentRollout]):
    """The built rollout.

    Args:
        writer: draws the student's replies.
        readers: whoever reads an episode, with how messages name it.
        teachers: those who are asked about its turns.
    """

    def __init__(
        self,
        writer: LanguageRollout,
        settings: AgentRollout,
        readers: Sequence[tuple[str, InProcess]],
        teachers: Sequence[LiveTeacher],
    ):
        self.writer, self.readers, self.asked = writer, readers, teachers
        self.language = writer.reader
        self.authors = writer.authors
        self.dtype, self.stale, self.elsewhere = writer.dtype, writer.stale, writer.elsewhere
        self.settings = settings
        self.arena = Arena[Exchange](settings.processes, settings.patience)
        self.counts: Counter[str] = Counter()
        self.played: list[TextEnvironment] = []
        self.warnings: list[str] = []
        self._form: CallFormat | None = None

    @property
    def notes(self) -> Sequence[str]:
        return [
            *self.writer.notes,
            *self.warnings,
            *(
                f"environment {kind_of(environment)!r} does not say the same again from one start, so a run that is "
                "resumed goes on with other episodes"
                for environment in self.played
                if not repeats(environment)
            ),
        ]

    def exact(self, settings: AgentRollout) -> bool:
        return self.writer.exact(settings)

    def held_out(self, settings: AgentRollout, context: Context, student: Student) -> HeldOutSampler:
        """The student by itself, on its own states, with nobody who watches."""
        alone = {"watch": None, "segment": None, "history": "student"}
        return HeldOutSampler(self, settings.model_copy(update=alone), context)

    def writers(self) -> list[PrefixSource]:
        return self.writer.writers()

    def check_draws(self, prompts: Sequence[Prompt], context: Context) -> None:
        self.writer.check_draws(prompts, context)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse rows without an environment of text, and templates that cannot hold its episodes."""
        for prompt in prompts:
            self._meet(TextEnvironment.of(prompt), prompt, self.settings)

    def _meet(self, environment: TextEnvironment, prompt: Prompt, settings: AgentRollout) -> None:
        """Check an environment the first time that a row names it; of held-out rows that is when they are played, and
        by the student, whose environments need no expert."""
        if settings.history == "data" and not environment.expert:
            raise DataError(
                f"{prompt.where}: rollout.history is 'data', and environment {kind_of(environment)!r} has no expert "
                "whose replies are played; take history: student"
            )
        if environment not in self.played:
            self._check(environment, prompt)
            self.played.append(environment)

    def _check(self, environment: TextEnvironment, prompt: Prompt) -> None:
        plain = next((which for which, reader in self.readers if reader.template != "chat"), None)
        if plain is not None:
            raise IncompatibleError(
                f"rollout 'agent' talks in turns, and {plain} has template: plain, which has none; take a model with a "
                "chat template"
            )
        if environment.tools() and self._form is None:
            self._form = call_format(self.language)
        # One that is over at once may have said nothing.
        opening = _opening(environment, prompt) or [{"role": "user", "content": "Begin."}]
        answer: Messages = [{"role": "tool" if environment.tools() else "user", "content": "Go on."}]
        seen = Place(0, prompt, 0, environment, list(opening)).seen()
        for which, reader in self.readers:
            why = rewritten(reader, seen, list(opening), answer)
            if why is not None and self.settings.rewritten == "refuse":
                raise IncompatibleError(
                    f"the chat template of {which} rewrites what was said: {why}. The student would read other states "
                    "than it was in: take a template that keeps turns, or set rollout.rewritten=keep"
                )

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        most = self.settings.max_context_tokens
        warning = check_positions(self.language, most, budget, "the student")
        self.warnings += [] if warning is None else [warning]
        # Rows are as long as tasks are named; all that is said in an episode comes between them and its last reply.
        between = max(0, most - max((len(ids_of(self.language.encode(prompt))) for prompt in prompts), default=0))
        told = f"; {between} of these are what an episode says before its last reply (rollout.max_context_tokens)"
        try:
            self.writer.check_lengths(prompts, budget + between)
            for teacher in self.asked:
                found = teacher.check_lengths(prompts, budget + between, _named(teacher))
                self.warnings += [f"{each}{told}" for each in found]
        except ModelError as error:
            raise ModelError(f"{error}{told}") from None

    def failures(self) -> Mapping[str, int]:
        return Counter(self.arena.lost) + Counter(self.writer.failures())

    def learn(self, settings: AgentRollout, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.writer.learn(settings, sum_over_processes)

    def beside(self) -> Mapping[str, Callable[[Path], None]]:
        return self.writer.beside()

    def state_dict(self) -> dict[str, Any]:
        return self.writer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.writer.load_state_dict(state)

    def own_signals(self) -> Mapping[str, float]:
        """Of the training episodes since it was last asked: turns of an episode, shares of episodes that ended by
        themselves, by `turns` and by `max_context_tokens`, the share of replies with a call that could not be read, and
        seconds and restarts of the environments."""
        found, self.counts = self.counts, Counter()
        signals = {f"agent/{name}": float(found[name]) for name in ("seconds", "restarts")}
        if found["episodes"]:
            signals["agent/turns"] = found["turns"] / found["episodes"]
            signals |= {f"agent/ended_{name}": found[name] / found["episodes"] for name in ENDED}
        if found["replies"]:
            signals["agent/faults"] = found["faults"] / found["replies"]
        return {**self.writer.own_signals(), **signals}

    def close(self) -> None:
        self.writer.close()
        self.arena.close()

    @torch.no_grad()
    def __call__(self, request: Request[AgentRollout]) -> Trajectories:
        if request.begun is not None:
            raise IncompatibleError("rollout 'agent' cannot go on what another source began")
        waiting = [
            Place(i, prompt, member, TextEnvironment.of(prompt))
            for i, (prompt, member) in enumerate((p, g) for p in request.prompts for g in range(request.group))
        ]
        played, places, parts = list(waiting), dict[int, Place](), list[Trajectories]()
        try:
            while waiting or places:
                free = [n for n in range(request.settings.worlds) if n not in places][: len(waiting)]
                begun = {number: waiting.pop(0) for number in free}
                places |= begun
                self._begin(begun, request)
                self._turn({n: place for n, place in places.items() if place.ended is None}, request, parts)
                places = {n: place for n, place in places.items() if place.ended is None}
        finally:
            counts = self.arena.read()
            # Held-out episodes are of no step.
            if request.stream >= 0:
                self.counts.update({name: counts[name] for name in ("seconds", "restarts")})
                self._count(played)
        return self._packed(request, played, parts)

    def _asks(self, environment: TextEnvironment, request: Request[AgentRollout]) -> bool:
        return request.settings.history == "data" and environment.expert

    def _begin(self, places: Mapping[int, Place], request: Request[AgentRollout]) -> None:
        """Begin the episodes of places that are free."""
        orders = []
        for number, place in places.items():
            self._meet(place.environment, place.prompt, request.settings)
            own = (request.context.seed, request.stream, place.prompt, request.group, place.member)
            start = start_of(place.prompt, row_seed(*own) % 2**31)
            orders.append(TextOrder(number, place.environment, start, self._asks(place.environment, request)))
        for place, exchange in zip(places.values(), self.arena.play(orders), strict=True):
            self._take(place, exchange, request)

    def _turn(self, places: Mapping[int, Place], request: Request[AgentRollout], parts: list[Trajectories]) -> None:
        """One reply in each of the places, and what comes of it."""
        going: dict[int, tuple[Place, Prompt]] = {}
        for number, place in places.items():
            prompt = place.seen()
            if len(ids_of(self.language.encode(prompt))) > request.settings.max_context_tokens:
                place.ended = "context"
                continue
            # Its own name for each turn, since draws depend on it, and on the member.
            named = replace(
                prompt,
                id=f"{prompt.id}/{len(place.written)}",
                repeat=prompt.repeat * request.group + place.member,
            )
            going[number] = (place, named)
        if not going:
            return
        prompts = [prompt for _, prompt in going.values()]
        settings: SamplingSettings = request.settings
        facts = (request.stream, settings, request.context)
        part = self.writer(Request(prompts, 1, request.budget, *facts, training=request.training))
        parts.append(part)
        ends, orders, talking = tokens_of(request.context).end_ids, [], []
        for row, (number, (place, _)) in enumerate(going.items()):
            place.written.append((len(parts) - 1, row))
            place.contexts.append(list(place.messages))
            if part.lost is not None and bool(part.lost[row]):
                place.ended = "lost"
                continue
            actions = part.completions()[row]
            form = self._form if place.environment.tools() else None
            reply = said(self.language, actions, ends, form)
            place.told.append({"number": len(place.written), "said": reply.text, "fault": reply.fault})
            given = place.expert if self._asks(place.environment, request) else None
            if given is None:
                place.messages.append({"role": "assistant", "content": reply.text, WRITTEN: actions.tolist()})
            else:
                place.messages.append(call_message(given))
            orders.append(TextOrder(number, place.environment, given or reply, self._asks(place.environment, request)))
            talking.append(place)
        for place, exchange in zip(talking, self.arena.play(orders), strict=True):
            self._take(place, exchange, request)

    def _take(self, place: Place, exchange: Exchange | None, request: Request[AgentRollout]) -> None:
        """Go on to what a world said, or end the episode."""
        if exchange is None:
            place.ended = "lost"
            return
        turn: Turn[Messages] = exchange.turn
        if place.told:
            place.told[-1]["heard"] = list(turn.observation)
        place.messages += turn.observation
        place.outcome, place.expert = turn.outcome, exchange.expert
        if turn.over:
            place.ended = "itself"
        elif len(place.written) >= request.settings.turns:
            place.ended = "turns"

    def _count(self, played: Sequence[Place]) -> None:
        for place in played:
            if place.ended == "lost":
                continue
            self.counts["episodes"] += 1
            self.counts["turns"] += len(place.written)
            self.counts[f"by_{place.ended}"] += 1
            self.counts["replies"] += len(place.told)
            self.counts["faults"] += sum(told["fault"] is not None for told in place.told)

    def _packed(
        self, request: Request[AgentRollout], played: Sequence[Place], parts: Sequence[Trajectories]
    ) -> Trajectories:
        """The turns of all episodes, those of one next to each other. An episode that has none, since its world could
        not begin or was over at once, is one lost trajectory without positions."""
        live = request.settings.history == "student"
        rows: list[tuple[int, int]] = []
        episodes: list[int] = []
        prompts: list[Prompt] = []
        rewards: list[float] = []
        lost: list[bool] = []
        silent = 0
        for place in played:
            gone = place.ended == "lost" or not place.written
            known = live and not gone
            for i, where in enumerate(place.written or [(len(parts), silent)]):
                rows.append(where)
                episodes.append(place.index)
                lost.append(gone)
                rewards.append(place.outcome if known else torch.nan)
                told: dict[str, Any] = (
                    {**place.told[i], "of": len(place.written)} if i < len(place.told) else {"number": i + 1}
                )
                told["ended"] = place.ended if i + 1 == len(place.written) else None
                before = replace(place, messages=place.contexts[i]) if place.contexts else place
                prompts.append(before.seen(told))
            silent += not place.written
        of_all = [*parts, *([_nothing(self.language, silent, request)] if silent else [])]
        starts = torch.tensor([0, *(len(part) for part in of_all)]).cumsum(0).tolist()
        # `join` wants to know where each of the parts' trajectories goes.
        flat = {starts[part] + row: i for i, (part, row) in enumerate(rows)}
        found = join(of_all, [flat[i] for i in range(len(rows))])
        of_episodes = torch.tensor(episodes)
        return replace(
            found,
            prompts=prompts,
            groups=of_episodes // request.group,
            episodes=of_episodes,
            rewards=torch.tensor(rewards, dtype=torch.float32) if live else None,
            lost=torch.tensor(lost) if any(lost) else None,
        )


def _named(teacher: LiveTeacher) -> str:
    return f"teacher {teacher.settings.name or ''}".rstrip()


def _opening(environment: TextEnvironment, prompt: Prompt) -> Messages:
    """What an environment says first.

    Raises:
        DataError: it cannot begin: its settings are its own, and whatever they come to shows here.
    """
    world = None
    try:
        world = environment.build()
        return list(world.reset(start_of(prompt, 0)).observation)
    except OpdError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise DataError(
            f"{prompt.where}: environment {kind_of(environment)!r} cannot begin the task {prompt.fields['task']!r} "
            f"({type(error).__name__}: {reason}); mend its settings (prompts.environment)"
        ) from None
    finally:
        if world is not None:
            world.close()


def _nothing(language: InProcess, count: int, request: Request[AgentRollout]) -> Trajectories:
    """Trajectories without a position, in the places of episodes that never began."""
    nothing = torch.zeros(0, dtype=torch.int64, device=request.context.device)
    return Trajectories(
        prompts=[request.prompts[0]] * count,
        contexts=[torch.zeros(1, dtype=torch.int64)] * count,
        actions=nothing,
        lengths=torch.zeros(count, dtype=torch.int64),
        behaviour_log_probs=nothing.float(),
        finished=torch.zeros(count, dtype=torch.bool),
        learn=nothing.bool(),
        authors=torch.full_like(nothing, AUTHORS.index("student"), dtype=torch.uint8),
        groups=torch.arange(count),
        lost=torch.ones(count, dtype=torch.bool),
    )
