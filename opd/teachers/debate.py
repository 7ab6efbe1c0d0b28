"""A teacher that is a deliberation: experts debate a prompt, then each scores the student's reply under the debate."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from opd.choice import OneOf, kind_of
from opd.context import Context
from opd.distributions import Distribution, Target
from opd.errors import DataError, IncompatibleError, ModelError, RunError
from opd.language.tokens import tokens_of
from opd.planning import Shape
from opd.policies.base import Student
from opd.prompts import Prompt
from opd.prompts.messages import Messages, check_view
from opd.teachers.base import DebateSize, LiveTeacher, Teacher, answers_whole_texts_alone
from opd.teachers.showing import ShowingTeacher
from opd.teachers.speaking import Manner, Said, Speaker, shown, speaker_of
from opd.teachers.transcripts import Debate, Transcripts, TranscriptSettings
from opd.teachers.wording import Domain, Wording
from opd.trajectories import Trajectories

KINDS = ("local", "routed", "served")
"""Teachers that can be experts: frozen models that write."""
ANSWERS = ("answer", "response")
"""Columns with an answer, which no debate may see."""
OF_THE_DEBATE = ("about", "temperature", "top_p", "top_k", "max_new_tokens", "weighting", "tau", "seed", "cache")
"""Keys that change nothing without a round."""
UNTAGGED = 8
"""Texts without any tag after which a debate is taken for one that has none."""


class DebateTeacher(Teacher):
    """MAD-OPD (arXiv 2605.01347): the experts debate what the student was asked, without seeing its reply, and then
    each gives its distributions at the reply's tokens, with the whole debate before them. The loss is the sum of the
    divergences to each, with a weight for each trajectory: `w_k = softmax_k(c_k / 100 / tau)` of how sure the experts
    say they are at the end of their last texts, or equal weights where one does not say it.

    In round 1 every expert answers for itself; in later ones it reads the prompt and all earlier texts. With
    `rounds: 0` nobody debates: several teachers with equal weights (MT-OPD).
    """

    kind: Literal["debate"] = "debate"
    modality: ClassVar[str | None] = "language"
    experts: dict[str, Annotated[Teacher, OneOf(Teacher, "local")]] = Field(
        min_length=1, description="The teachers that debate, of kinds local, served or routed, by name"
    )
    rounds: int = Field(2, ge=0, le=16, description="Texts of each expert; 0: no debate, equal weights")
    domain: Domain = Field("general", description="What the experts are told that they are and are to look at")
    wording: Wording = Field(Wording(), description="Texts of the debate")
    about: str | None = Field(
        None,
        description="Column with what is debated; default what the teacher sees. With another row's prompt it is the "
        "control that shows whether the debate's contents matter",
    )
    weighting: Literal["confidence", "uniform"] = Field("confidence", description="How much each expert counts")
    tau: float = Field(1.0, gt=0, description="Temperature of the weights: smaller ones sharpen them")
    temperature: float = Field(0.7, ge=1e-6, le=1e6, description="Of the experts' texts")
    top_p: float = Field(0.8, gt=0, le=1, description="Of the experts' texts: keep the most likely tokens of this mass")
    top_k: int = Field(20, ge=0, description="Of the experts' texts: keep so many tokens; 0 keeps all")
    max_new_tokens: int = Field(4096, ge=1, le=10_000_000, description="Most tokens of one text; it is cut there")
    seed: int | None = Field(
        None, ge=0, description="Of the experts' draws; default the run's. Runs with one seed here share debates"
    )
    cache: TranscriptSettings | None = Field(
        None, description="Keep debates on disk for other runs too; true takes the defaults"
    )

    @field_validator("cache", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _fits(self) -> DebateTeacher:
        for name, expert in self.experts.items():
            if not name or "." in name:
                raise ValueError(
                    f"expert {name!r}: a name is not empty and has no dot, which separates keys; rename it"
                )
            if kind_of(expert) not in KINDS:
                raise ValueError(
                    f"expert {name!r} is of kind {kind_of(expert)!r}; experts are frozen models that write, of kind "
                    f"{', '.join(KINDS)}"
                )
            if expert.name is not None:
                raise ValueError(f"expert {name!r} has a name, {expert.name!r}; its key is its name, remove it")
            for member in (expert, *getattr(expert, "routes", {}).values()):
                if member.sees is not None:
                    raise ValueError(
                        f"expert {name!r} has sees: {member.sees!r}, and all debate one thing; set sees of the debate"
                    )
                if isinstance(member, ShowingTeacher) and member.shows:
                    raise ValueError(
                        f"expert {name!r} is shown a system text or examples of its own, and all debate one thing; say "
                        "who an expert is in wording.role"
                    )
            if expert.weight != 1.0:
                raise ValueError(
                    f"expert {name!r} has a weight, and the debate decides how much each counts (weighting, tau); "
                    "remove it"
                )
        for key, column in (("sees", self.sees), ("about", self.about)):
            if column in ANSWERS:
                raise ValueError(f"{key} is {column!r}: the debate is blind to answers; name a column with a prompt")
        if self.batch != Teacher.model_fields["batch"].default:
            raise ValueError("'batch' is a setting of each expert; move it there")
        return self

    @property
    def debate(self) -> DebateSize:
        rows = max(member.batch for expert in self.experts.values() for member in _answering(expert))
        return DebateSize(len(self.experts), self.rounds, self.max_new_tokens, rows)

    def answered(self, student: type[Distribution]) -> list[tuple[type[Distribution], str]]:
        return [each for expert in self.experts.values() for each in expert.answered(student)]

    @property
    def listed(self) -> int | None:
        return min((k for expert in self.experts.values() if (k := expert.listed) is not None), default=None)

    def check_scorer(self, home: torch.device) -> None:
        raise answers_whole_texts_alone(self)

    def voiced(self, student: Shape, notes: list[str]) -> list[list[Shape]]:
        return [
            [replace(shape, name=f"{shape.name}, expert {name}") for shape in expert.shapes(student, notes)]
            for name, expert in self.experts.items()
        ]

    def shapes(self, student: Shape, notes: list[str]) -> list[Shape]:
        return [shape for shapes in self.voiced(student, notes) for shape in shapes]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            for key, column in (("sees", self.sees), ("about", self.about)):
                if column is None:
                    continue
                view = check_view(prompt.view(column), prompt.where, column)
                seen = [name for name in ANSWERS if prompt.fields.get(name) == view]
                if seen:
                    raise DataError(
                        f"{prompt.where}: teacher.{key} is {column!r}, which holds the same as the column {seen[0]!r}: "
                        "the debate is blind to answers; name a column with a prompt"
                    )
            for expert in self.experts.values():
                expert.check_prompts([prompt])

    def build(self, context: Context, student: Student) -> LiveDebate:
        # What was opened for a debate that does not come about is closed.
        with ExitStack() as opened:
            experts: dict[str, LiveTeacher] = {}
            for name, expert in self.experts.items():
                experts[name] = expert.build(context, student)
                opened.callback(experts[name].close)
            found = LiveDebate(self, experts)
            opened.pop_all()
            return found


def _answering(expert: Teacher) -> list[Teacher]:
    return list(getattr(expert, "routes", {}).values()) or [expert]


@dataclass
class Tally:
    """What was counted since it was last asked for."""

    wanted: int = 0
    held: int = 0
    written: int = 0
    read: int = 0
    asked: int = 0
    untagged: int = 0

    def numbers(self) -> list[float]:
        return [float(value) for value in vars(self).values()]


class LiveDebate(LiveTeacher[DebateTeacher]):
    """The built debate.

    Raises:
        IncompatibleError: experts that answer different kinds of distribution, or one that cannot write.
    """

    member_role = "expert"

    def __init__(self, settings: DebateTeacher, experts: Mapping[str, LiveTeacher]):
        self.settings, self.experts = settings, dict(experts)
        kinds = {name: expert.answers.kind for name, expert in self.experts.items()}
        if len(set(kinds.values())) > 1:
            told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise IncompatibleError(
                f"the experts of a debate must answer alike, and these do not: {told}; serve them with `opd serve` and "
                "take answers: exact, or give all of them the same answers"
            )
        self.answers = next(iter(self.experts.values())).answers
        self.voices = len(self.experts)
        self.remembers = any(expert.remembers for expert in self.experts.values())
        self.speakers: dict[str, Speaker] = {}
        if settings.rounds:
            self.speakers = {name: speaker_of(e, f"expert {name!r} of the debate") for name, e in experts.items()}
        self.transcripts = Transcripts(settings.cache, settings.rounds, self.voices)
        self.failed: Counter[str] = Counter()
        self.tally = Tally()
        self._sums = {name: [0.0, 0.0] for name in self.experts}
        self._tagged = False
        self._known: dict[str, str] = {}
        self._seed: int | None = None

    @property
    def names(self) -> list[str]:
        return list(self.experts)

    @property
    def notes(self) -> list[str]:
        found = [note for expert in self.experts.values() for note in expert.notes]
        unused = [key for key in OF_THE_DEBATE if key in self.settings.model_fields_set]
        if not self.settings.rounds and unused:
            found.append(
                f"teacher.rounds is 0: nobody debates, every teacher counts alike, and {', '.join(unused)} change "
                "nothing"
            )
        return found

    # -- the debate ------------------------------------------------------------------------------------------------

    def topic(self, prompt: Prompt) -> str | Messages:
        """What is debated about a prompt."""
        return prompt.view(self.settings.about or self.settings.sees)

    def _speaking(self, expert: LiveTeacher, prompt: Prompt) -> LiveTeacher:
        route = expert.route(prompt)
        return expert if route is None else expert.members()[route]

    def _of_expert(self, expert: LiveTeacher, prompt: Prompt) -> str:
        """What its texts depend on besides what it reads."""
        writer = self._speaking(expert, prompt)
        reader = getattr(writer, "language", getattr(writer, "reader", None))
        name = f"{id(writer)}"
        if name not in self._known:
            self._known[name] = f"{writer.identity()} {reader.tokenizer_hash} {reader.template_hash}"  # type: ignore[union-attr]
        return self._known[name]

    def key(self, prompt: Prompt, seed: int) -> str:
        """Of a prompt's debate: the same for what is debated alike by the same experts under the same settings."""
        own = self.settings
        told = {
            "experts": {name: self._of_expert(expert, prompt) for name, expert in self.experts.items()},
            "topic": self.topic(prompt),
            "given": {name: prompt.fields.get(name) for name in ("tools", "chat_template_kwargs")},
            "settings": own.model_dump(include={"rounds", "domain", "temperature", "top_p", "top_k", "max_new_tokens"}),
            "wording": own.wording.model_dump(),
            "seed": own.seed if own.seed is not None else seed,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def debates(self, prompts: Sequence[Prompt], context: Context) -> list[Debate | None]:
        """The debate about each prompt, held where it was not yet; None where an expert said nothing. Nobody's reply is
        seen: what is written depends on the prompts, the experts, the settings and the seed."""
        self._seed = context.seed
        keys = [self.key(prompt, context.seed) for prompt in prompts]
        wanted = dict(zip(keys, prompts, strict=True))
        new = {key: prompt for key, prompt in wanted.items() if self.transcripts.find(key) is None}
        self.tally.wanted += len(wanted)
        self.tally.held += len(new)
        if new:
            self._hold(new, context)
        return [self.transcripts.find(key) for key in keys]

    def prepare(self, prompts: Sequence[Prompt], context: Context) -> None:
        if self.settings.rounds:
            self.debates(prompts, context)

    def _hold(self, prompts: Mapping[str, Prompt], context: Context) -> None:
        own, names = self.settings, self.names
        manner = Manner(own.temperature, own.top_p, own.top_k, own.max_new_tokens)
        rounds: dict[str, list[tuple[str, ...]]] = {key: [] for key in prompts}
        tokens = Counter[str]()
        for number in range(own.rounds):
            going, begun = list(rounds), {}
            for name in names:
                # All write from the same history; nobody sees a text of this round.
                read = [shown(prompts[key], self._read(prompts[key], name, rounds[key])) for key in going]
                seeds = [_row_seed(key, number, name) for key in going]
                begun[name] = self.speakers[name].begin(read, seeds, manner, context)
            said = {name: wait() for name, wait in begun.items()}
            for i, key in enumerate(going):
                texts = [said[name][i] for name in names]
                self.tally.written += sum(text.written for text in texts)
                self.tally.read += sum(text.read for text in texts)
                if not self._all_said(texts):
                    del rounds[key]
                    continue
                tokens[key] += sum(text.written for text in texts)
                rounds[key].append(tuple(text.text for text in texts))
        for key, texts_of in rounds.items():
            self.transcripts.keep(key, Debate(tuple(texts_of), tokens[key]))

    def _all_said(self, texts: Sequence[Said]) -> bool:
        failures = [text.failure for text in texts if text.failure is not None]
        self.failed.update(failures[:1])
        return not failures

    def _read(self, prompt: Prompt, name: str, rounds: Sequence[Sequence[str]]) -> str | Messages:
        """What an expert reads before it writes in the round behind `rounds`."""
        wording, view, domain = self.settings.wording, self.topic(prompt), self.settings.domain
        if not rounds:
            return wording.first(view, name, domain)
        return wording.later(view, name, domain, self.names, rounds)

    def sure(self, debate: Debate) -> list[float | None]:
        """How sure each expert said it was in its last text, 0 to 100."""
        return [self.settings.wording.sure(text) for text in debate.rounds[-1]]

    def weights(self, debate: Debate | None) -> list[float]:
        """How much each expert counts; the sum is 1."""
        equal = [1 / self.voices] * self.voices
        if debate is None or self.settings.weighting == "uniform":
            return equal
        sure = [each for each in self.sure(debate) if each is not None]
        if len(sure) < self.voices:
            return equal
        return (torch.tensor(sure, dtype=torch.float64) / 100 / self.settings.tau).softmax(0).tolist()

    def _count(self, debates: Sequence[Debate]) -> None:
        """Note confidences and weights of the debates that a call rests on.

        Raises:
            RunError: no text ever said how sure it is.
        """
        for debate in debates:
            sure = self.sure(debate)
            self.tally.asked += 1
            self.tally.untagged += any(each is None for each in sure)
            for name, each, weight in zip(self.names, sure, self.weights(debate), strict=True):
                self._sums[name][0] += weight
                self._sums[name][1] += each or 0.0
        if self.settings.weighting == "uniform" or self._tagged:
            return
        said = [each for debate in self.transcripts.held.values() for each in self.sure(debate)]
        self._tagged = any(each is not None for each in said)
        if not self._tagged and len(said) >= UNTAGGED:
            raise RunError(
                f"none of {len(said)} texts that ended a debate holds the tag {self.settings.wording.tag!r}, so "
                "every expert would count alike: mend teacher.wording, let texts be longer (teacher.max_new_tokens), "
                "or set teacher.weighting: uniform"
            )

    # -- answers ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(self, trajectories: Trajectories, settings: DebateTeacher, context: Context) -> list[Target]:
        prompts, debates = trajectories.prompts, list[Debate | None]([None] * len(trajectories))
        missing = None
        if settings.rounds:
            debates = self.debates(prompts, context)
            self._count(list({id(each): each for each in debates if each is not None}.values()))
            lost = torch.tensor([debate is None for debate in debates], dtype=torch.bool)
            missing = lost.repeat_interleave(trajectories.lengths).to(context.device) if bool(lost.any()) else None
        weights = torch.tensor([self.weights(debate) for debate in debates], dtype=torch.float32)
        weights = weights.repeat_interleave(trajectories.lengths, 0).to(context.device)
        targets, asked = [], 0.0
        for k, (name, expert) in enumerate(self.experts.items()):
            views = [shown(p, self._scored(p, name, debate)) for p, debate in zip(prompts, debates, strict=True)]
            part = replace(trajectories, prompts=views, answers=None)
            (said,) = expert.answer(part, settings.experts[name], context)
            asked += expert.asked
            whose = _either(said.missing, missing)
            # A routed expert's routes may weigh differently.
            weight = weights[:, k] * (said.weight if isinstance(said.weight, float) else said.weight.to(weights))
            targets.append(replace(said, weight=weight, teacher=settings.name, missing=whose))
        self.asked = asked / self.voices
        return targets

    def _scored(self, prompt: Prompt, name: str, debate: Debate | None) -> str | Messages:
        """Under what an expert scores a reply: what it sees, and the debate."""
        view = prompt.view(self.settings.sees)
        if debate is None:
            return view
        return self.settings.wording.scoring(view, name, self.names, debate.rounds)

    def considered(self, prompt: Prompt) -> dict[str, Any] | None:
        debate = None
        if self.settings.rounds and self._seed is not None:
            debate = self.transcripts.find(self.key(prompt, self._seed))
        if debate is None:
            return None
        texts = [[self.settings.wording.without_tag(text) for text in of_round] for of_round in debate.rounds]
        sure = [[self.settings.wording.sure(text) for text in of_round] for of_round in debate.rounds]
        weights = [round(weight, 4) for weight in self.weights(debate)]
        return {"experts": self.names, "rounds": texts, "sure": sure, "weights": weights}

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        of_each = {
            f"{signal}@{name}": value
            for name, expert in self.experts.items()
            for signal, value in expert.own_signals(sum_over_processes).items()
        }
        return of_each | (self._of_debates(sum_over_processes) if self.settings.rounds else {})

    def _of_debates(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        sums = [total for each in self._sums.values() for total in each]
        found = torch.tensor([*self.tally.numbers(), *sums], dtype=torch.float64)
        self.tally, self._sums = Tally(), {name: [0.0, 0.0] for name in self.experts}
        wanted, held, written, read, asked, untagged, *of_experts = sum_over_processes(found).tolist()
        signals = {"debate/held": held, "debate/tokens": written, "debate/read_tokens": read}
        if wanted:
            signals["debate/hit_rate"] = 1 - held / wanted
        if asked:
            signals["debate/untagged"] = untagged / asked
            for name, weight, sure in zip(self.names, of_experts[::2], of_experts[1::2], strict=True):
                signals |= {f"debate/weight/{name}": weight / asked, f"debate/sure/{name}": sure / asked}
        return signals

    # -- what is asked of any teacher ------------------------------------------------------------------------------

    def members(self) -> dict[str, LiveTeacher]:
        return {
            name if tag == "" else f"{name} {tag}": member
            for name, expert in self.experts.items()
            for tag, member in expert.members().items()
        }

    def close(self) -> None:
        for expert in self.experts.values():
            expert.close()

    def failures(self) -> dict[str, int]:
        counts = Counter(self.failed)
        for expert in self.experts.values():
            counts.update(expert.failures())
        return dict(counts)

    def fingerprint(self) -> str:
        told = "".join(f"{name} {expert.fingerprint()}\n" for name, expert in self.experts.items())
        return hashlib.sha256(told.encode()).hexdigest()

    def check_scorer(self, context: Context) -> None:
        raise answers_whole_texts_alone(self.settings)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        nothing = Debate((("",) * self.voices,) * self.settings.rounds, 0) if self.settings.rounds else None
        for prompt in prompts:
            for name, expert in self.experts.items():
                views = [self._scored(prompt, name, nothing)]
                if nothing is not None:
                    views += [self._read(prompt, name, nothing.rounds[:r]) for r in (0, 1)[: self.settings.rounds]]
                expert.check_prompts([shown(prompt, view) for view in views])

    def check_lengths(self, prompts: Sequence[Prompt], budget: int, which: str) -> list[str]:
        size, warnings = self.settings.debate, []
        nothing = Debate((("",) * self.voices,) * size.rounds, 0) if size.rounds else None
        told = f"; up to {size.transcript} of these are the debate's (teacher.rounds, teacher.max_new_tokens)"
        for name, expert in self.experts.items():
            views = [shown(prompt, self._scored(prompt, name, nothing)) for prompt in prompts]
            try:
                found = expert.check_lengths(views, budget + size.transcript, f"{which}'s expert {name!r}")
            except ModelError as error:
                raise ModelError(f"{error}{told if size.rounds else ''}") from None
            warnings += [f"{warning}{told if size.rounds else ''}" for warning in found]
        return warnings

    def check_student(self, student: Student, context: Context) -> None:
        if self.settings.rounds and tokens_of(context).vocabulary.ids is not None:
            raise IncompatibleError(
                f"this run compares a slice of the vocabulary ({tokens_of(context).vocabulary}), and a debate needs "
                "all of a tokenizer's tokens for its texts: set teacher.rounds=0"
            )
        for expert in self.experts.values():
            expert.check_student(student, context)

    def check_origin(self, student: Student) -> None:
        for expert in self.experts.values():
            expert.check_origin(student)

    def state_dict(self) -> dict[str, Any]:
        """The debates that were held, and what was counted since a step last logged it."""
        return {
            "debates": self.transcripts.state_dict(),
            "tally": vars(self.tally).copy(),
            "sums": self._sums,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.transcripts.load_state_dict(state["debates"])
        self.tally, self._sums = Tally(**state["tally"]), {name: list(each) for name, each in state["sums"].items()}


def _row_seed(key: str, number: int, name: str) -> int:
    """63-bit seed of one text, the same whatever else is debated at the same time."""
    told = f"{key}/{number}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1


def _either(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """bool `[N]` where one of two marks is set."""
    if first is None or second is None:
        return second if first is None else first
    return first | second.to(first.device)
