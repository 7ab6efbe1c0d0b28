"""A drafter as the student: it proposes blocks of tokens, which a frozen target verifies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.choice import Choice, OneOf, kind_of
from opd.context import Context
from opd.distributions import Categorical, Distribution, Head, Vocabulary
from opd.divergences import compare
from opd.drafting import evaluation
from opd.drafting.base import Drafter, DrafterSettings, Outline
from opd.drafting.evaluation import STEPS, DraftEvaluation, counts_of
from opd.drafting.exported import Exported
from opd.drafting.formats import FORMATS, NATIVE, Made
from opd.drafting.native import difference, load_drafter, save_drafter, saved_form
from opd.drafting.record import Drafted, blocks_of, saved
from opd.drafting.servers import NATIVE_SERVERS, SERVERS, Served, ServerName, check_served, own_form
from opd.drafting.target import Target, draft_head
from opd.drafting.tokens import DraftTokens
from opd.errors import IncompatibleError, ModelError, RunError, SelfTestError
from opd.files.whole import attempt
from opd.language.engines.in_process import InProcess
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings, load_config
from opd.language.positions import check_positions
from opd.language.student import LanguageStudent
from opd.language.tokens import tokens_of
from opd.objectives import Objective
from opd.planning import Shape
from opd.policies.base import Policy, Written
from opd.policies.evaluation import Evaluation
from opd.policies.held_out import HeldOut, Measured, Moment
from opd.prompts import Prompt
from opd.provenance import read_origin
from opd.trajectories import Trajectories
from opd.weights import fingerprint

if TYPE_CHECKING:
    from opd.rollouts import HeldOutSampler
    from opd.teachers import LiveTeacher
    from opd.teachers.self_teacher import SelfTeacher

MOST_SLOTS = 256
"""Of a block."""

NO_OTHER_TEACHER = (
    "a drafter's positions are the slots of proposed blocks, of which only its target can say something: take "
    "teacher: target"
)

OTHER_TEACHERS = ("local", "self", "served", "stored", "routed")
"""Kinds of teachers that say something of tokens, and nothing of the slots of a block."""

ALONG_TEXTS = (("shaping", "drift"), ("curriculum", "window"))
"""Choices that go along the positions of a trajectory as along a text."""

NO_BLOCKS = {
    "student": "take speculative, with which the target writes and the drafter proposes",
    "teacher": "take speculative, with which the target writes and the drafter proposes",
    "stored": "take {kind: anchored, texts: {kind: stored, path: ...}}, which places blocks in stored texts",
    "data": "take {kind: anchored, texts: {kind: data, ...}}, which places blocks in given texts",
}
"""Kinds of rollouts in which nobody proposes a block, with what to take instead."""


class Draft(Policy):
    """A draft model for speculative decoding with `target`, which stays as it is: loaded from the folder `model`, or
    new in the form that `drafter` says."""

    kind: Literal["draft"] = "draft"
    modality: ClassVar[str | None] = "language"
    teacher: ClassVar[str] = "target"
    answers: ClassVar[type[Distribution]] = Categorical
    evaluation: ClassVar[type[Evaluation]] = DraftEvaluation
    of_live: ClassVar[tuple[str, ...]] = ("target", "servers")
    formats: ClassVar[tuple[str, ...]] = (NATIVE, *FORMATS)
    target: ModelSettings = Field(description="The model that is sped up: it writes, verifies and teaches")
    model: str | None = Field(None, description="Folder of a drafter in its native format; default a new one")
    drafter: Annotated[DrafterSettings, OneOf(DrafterSettings)] | None = Field(
        None, description="Form of a new drafter; a saved one has that of its folder, which may be said here too"
    )
    servers: list[ServerName] = Field(
        [],
        description="Who will load the drafter; what one of them would read otherwise than here is refused",
    )

    @field_validator("target", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("drafter")
    @classmethod
    def _new_or_saved(cls, value: DrafterSettings | None, info: ValidationInfo) -> DrafterSettings | None:
        model = info.data.get("model")
        if "model" in info.data and value is None and model is None:
            raise ValueError("give model, the folder of a drafter, or drafter, the form of a new one (chain, block)")
        return value

    def misfit(self, part: Choice) -> str | None:
        kind = kind_of(part)
        if part.axis == "teacher" and kind in OTHER_TEACHERS:
            return NO_OTHER_TEACHER
        if part.axis == "rollout" and kind in NO_BLOCKS:
            return f"it makes no blocks for a drafter to learn on; {NO_BLOCKS[kind]}"
        if isinstance(part, Objective) and part.needs_reward:
            return "a verdict is on the target's text, which is the same with any drafter; take accepted and rejected"
        if isinstance(part, Objective) and part.end == "mask":
            return "end is 'mask', and the last slot of an answer's blocks is not its end token; remove the key"
        if (part.axis, kind) in ALONG_TEXTS:
            return "it goes along a text, and the slots of one block after another are none; leave it out"
        return None

    def readers(self, form: str | None) -> str:
        names = NATIVE_SERVERS if form in (None, NATIVE) else FORMATS[str(form)].servers
        told = f"a drafter of {self.target.model}, in the format {form or NATIVE!r} for {' and '.join(names)}"
        return f"{told}; README.md there says how each is started" if form in (None, NATIVE) else told

    def build(self, context: Context) -> DraftStudent:
        language = LanguageModel.load(self.target, context.device)
        target, head = Target(language), language.head(1.0).detach()
        if self.model is not None:
            drafter = load_drafter(self.model, target.outline, head, asked=self.drafter)
            return self._student(target, drafter, context, read_origin(Path(self.model)))
        assert self.drafter is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            return self._student(target, self.drafter.build(target.outline, head), context)

    def _student(
        self, target: Target, drafter: Drafter, context: Context, origin: dict[str, Any] | None = None
    ) -> DraftStudent:
        self.check_servers(drafter, target.language.base)
        return DraftStudent(target, drafter, context, origin, self.target)

    def check_servers(self, drafter: Drafter, target: PreTrainedModel) -> None:
        """Raise `ModelError` where one of `servers` would misread the drafter of a target, or cannot load the target;
        both may be on meta."""
        named = self.target.model
        if self.servers and (named.startswith("package:") or named.endswith(".gguf")):
            raise ModelError(
                f"student.servers names {self.servers[0]!r}: student.target.model is {named!r}, which servers do not "
                "load as it is here; save it as a folder of transformers and name that, or leave servers out"
            )
        check_served(self.servers, self.served(drafter, target), "student.servers names")

    def served(self, drafter: Drafter, target: PreTrainedModel) -> Served:
        """What servers see of the drafter of a target."""
        return Served(drafter, target, self.target.drop_layers, self.target.dtype)

    def shape(self, notes: list[str]) -> Shape:
        """Of the drafter; its `model` has no weights. A saved one that is not at hand is taken to have the form that
        the recipe says."""
        outline = Outline.of(load_config(self.target, notes), "student.target")
        form, name = self.drafter, "a new drafter"
        if self.model is not None:
            name = self.model
            if form is None or Path(self.model).expanduser().exists():
                form = saved_form(self.model, outline, asked=form)
            else:
                notes.append(f"student.model {self.model} is not at hand: it is taken to have the form student.drafter")
        assert form is not None
        form = form.settled(outline)
        with torch.device("meta"):
            made = form.build(outline, Head(torch.empty(outline.vocabulary, outline.width)))
        own, count = made.own_head(), sum(p.numel() for p in made.parameters())
        return Shape(
            name=name,
            parameters=count,
            trainable=count,
            weight_bytes=4 * count,
            width=outline.width,
            vocabulary=outline.vocabulary if own is None else len(own),
            model=made,
        )

    @classmethod
    def takes(cls, model: object) -> bool:
        return isinstance(model, Drafter)

    @classmethod
    def weights(cls, model: object) -> Iterator[torch.nn.Parameter]:
        assert isinstance(model, Drafter)
        return iter(model.parameters())

    def live_student(self, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context) -> DraftStudent:
        assert isinstance(model, Drafter)
        return self._student(Target(LanguageModel.load(self.target, context.device)), model, context)

    @classmethod
    def live_teacher(cls, model: object, tokenizer: PreTrainedTokenizerBase | None, context: Context) -> LiveTeacher:
        raise RunError(f"distill() got a drafter as a teacher; {NO_OTHER_TEACHER}")


def slots_of(trajectories: Trajectories) -> dict[str, float]:
    """How many `answers` there are along which the target verified, and steps of that, `of/K`, whose block has a slot
    K."""
    sizes = torch.zeros(0, dtype=torch.int64)
    for record, positions in zip(trajectories.contexts, trajectories.lengths.tolist(), strict=True):
        own = record.slots(positions)
        sizes = torch.cat([sizes, own if record.steps is None else own[record.steps]])
    most = int(sizes.max()) if len(sizes) else 0
    return {f"of/{k}": float((sizes >= k).sum()) for k in range(1, most + 1)} | {
        "answers": float(sum(record.walked for record in trajectories.contexts))
    }


class DraftStudent(LanguageStudent):
    """The built policy: a drafter that is trained, and its target, which is not. `origin` is what the run that saved it
    wrote about it, if one did; `source` how the target was loaded."""

    library = "opd"

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        context: Context,
        origin: dict[str, Any] | None = None,
        source: ModelSettings | None = None,
    ):
        super().__init__()
        self.source = source
        target.language.requires_grad_(False).eval().owner = "the target"
        self.target = Target(target.language, drafter.taps)
        self.drafter = drafter.to(context.device).float()
        self.module: torch.nn.Module = self.drafter
        self.context, self.origin = context, origin or {}
        self._seen: dict[str, float] = {}

    @property
    def reader(self) -> InProcess:
        return self.target.language

    def __call__(self, trajectories: Trajectories, context: Context | None = None) -> Categorical:
        """At each slot, as the drafter proposes it behind the recorded text, the anchor and the block's tokens
        before."""
        now = self.facts(context)
        training = torch.is_grad_enabled()
        if training:
            counts = counts_of(trajectories.contexts) | slots_of(trajectories)
            for name, count in counts.items():
                self._seen[name] = self._seen.get(name, 0.0) + count
        # The wrapper of several processes talks to the others in every pass.
        module = self.module if training else self.drafter
        head = draft_head(self.drafter, self.target, tokens_of(now).vocabulary, now.temperature)
        blocks = blocks_of(trajectories.contexts, trajectories.completions(), now.device)
        return Categorical(module(blocks, self.target.embed), head)

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Of the step's rollouts `acceptance_length`, `accepted_proposals` of a block, `accepted_at/K`, the share of
        blocks whose proposal at slot K stood, and what was saved (`opd.drafting.record.saved`)."""
        # Every process sums as many numbers, whatever it has seen.
        slots = range(1, MOST_SLOTS + 1)
        names = ("answers", *STEPS, *(f"at/{k}" for k in slots), *(f"of/{k}" for k in slots))
        mine = torch.tensor([self._seen.get(name, 0.0) for name in names], dtype=torch.float64)
        seen = dict(zip(names, sum_over_processes(mine).tolist(), strict=True))
        self._seen = {}
        steps = seen["steps"]
        if not steps:
            return {}
        shares = {f"accepted_at/{k}": seen[f"at/{k}"] / steps for k in slots if seen[f"of/{k}"]}
        lengths = {"acceptance_length": seen["committed"] / steps, "accepted_proposals": seen["accepted"] / steps}
        return lengths | shares | saved(seen["answers"] + steps, seen["tokens"])

    def agree(self, context: Context, teachers: Sequence[LiveTeacher], end_tokens: Sequence[int] | None) -> Context:
        strange = next((t for t in teachers if getattr(t, "target", None) is not self.target), None)
        if strange is not None:
            raise IncompatibleError(f"teacher {type(strange).__name__} beside student.kind draft: {NO_OTHER_TEACHER}")
        agreed = super().agree(context, [], end_tokens)
        own = tokens_of(agreed)
        ids = self.drafter.ids
        unknown = next((i for i in ids or () if not own.vocabulary.holds(i)), None)
        if unknown is not None:
            raise IncompatibleError(
                f"the drafter may propose id {unknown}, which is no token that its target writes; take it out of its "
                "vocabulary"
            )
        proposed = own.vocabulary if ids is None else Vocabulary.of(ids)
        return agreed.with_(agreed=DraftTokens(proposed, own.end_ids, own.vocabulary))

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> list[str]:
        longest = max((len(self.reader.encode(prompt)) for prompt in prompts), default=1)
        warning = check_positions(self.reader, longest, budget, "the target")
        return [] if warning is None else [warning]

    @torch.no_grad()
    def check_outputs(self, trajectories: Trajectories, tolerance: float) -> None:
        """The blocks that this drafter proposed in the rollout must be as likely to be proposed when they are drafted
        again."""
        # Where others proposed, or nobody did, it is not known.
        proposed = trajectories.columns.get("log_q", torch.zeros(0))
        known = ~proposed.isnan()
        if not bool(known.any()):
            return
        again = compare(self(trajectories, self.context.with_(temperature=1.0)), None, trajectories.actions)
        gap = float((again.values["log_q"] - proposed)[known].abs().mean())
        if not gap <= tolerance:
            raise SelfTestError(
                f"the drafter gives its own proposals other log-probabilities when they are drafted again, by "
                f"{gap:.2g} nats on average (tolerance {tolerance:g}): what proposes and what trains are not one model"
            )

    def outcomes(self, trajectories: Trajectories) -> list[str]:
        return [self.decode(record.response) for record in trajectories.contexts]

    def rows(self, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """`tokens` are the proposals, block by block; `completion` is the answer; `blocks` says of each block how many
        proposals it has, how many of them the target `accepted`, and what it wrote behind those (`own`, None where the
        answer ended)."""
        columns = {
            name: trajectories.columns[name].float() for name in ("slot", "accepted") if name in trajectories.columns
        }
        rows = super().rows(trajectories, columns | values)
        for row, record, answer in zip(rows, trajectories.contexts, self.outcomes(trajectories), strict=True):
            assert isinstance(record, Drafted)
            row["completion"] = answer
            texts = self.tokens(record.response)
            places = (record.anchors + record.accepted + 1 - len(record.prompt)).tolist()
            of_blocks = (places, record.accepted.tolist(), record.committed.tolist())
            sizes = record.slots(len(row["tokens"])).tolist()
            row["blocks"] = [
                {"proposals": size, "accepted": stood, "own": texts[place] if added > stood else None}
                for size, place, stood, added in zip(sizes, *of_blocks, strict=True)
            ]
        return rows

    def own_sampler(self, context: Context) -> HeldOutSampler:
        from opd.rollouts import HeldOutSampler
        from opd.rollouts.speculative import Speculative, SpeculativeRollout

        source = Speculative(self.target, self.drafter, asked=False, name=None)
        return HeldOutSampler(source, SpeculativeRollout(), context)

    def measured_by(self, sampler: HeldOutSampler, settings: Evaluation) -> HeldOutSampler:
        assert isinstance(settings, DraftEvaluation)
        return sampler if settings.temperature is None else sampler.changed(text_temperature=settings.temperature)

    def measure(self, run: Measured, at: Moment) -> HeldOut:
        slots = getattr(at.sampler.settings, "proposals", None) or self.drafter.proposals
        return evaluation.measure(run, self, at, slots)

    def as_teacher(self, settings: SelfTeacher, context: Context) -> LiveTeacher:
        raise IncompatibleError(f"teacher 'self' beside student.kind draft: {NO_OTHER_TEACHER}")

    def live(self) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
        return self.drafter.eval(), self.reader.tokenizer

    def fingerprint(self) -> str:
        """Of what the state is a state of, besides the recipe: the target's weights, and the ids that the drafter may
        propose, which may have been counted in a store."""
        of_target = fingerprint(self.target.language.model.named_parameters())
        if self.drafter.ids is None:
            return of_target
        return f"{of_target}, ids {hashlib.sha256(repr(self.drafter.ids).encode()).hexdigest()[:16]}"

    def save(self, folder: Path, card: str) -> list[str]:
        """`folder` is loaded by servers that know the drafter's form (SGLang, vLLM), and by `student.model`."""
        embedding: Any = self.reader.base.get_input_embeddings()
        save_drafter(folder, self.drafter, embedding.weight)
        told = f"{card}{self.serving()}"
        return attempt("the model card", lambda: (folder / "README.md").write_text(told, encoding="utf-8"))

    def serving(self) -> str:
        """For the model card: how those that load the native format are started with it, and who would misread it."""
        dropped, dtype = ([], "auto") if self.source is None else (self.source.drop_layers, self.source.dtype)
        served = Served(self.drafter, self.reader.base, dropped, dtype)
        of = "its target" if self.source is None else f"`{self.source.model}`"
        lines = [f"\nA draft model for {of}, and for no other model. STUDENT is this folder, TARGET that model:\n"]
        for name in NATIVE_SERVERS:
            why = own_form(served) or SERVERS[name].misreads(served)
            lines.append(f"- {name}: " + (f"`{SERVERS[name].launch(served)}`" if why is None else f"not; {why}"))
        return "\n".join(lines) + "\n"

    def compare(self, folder: Path) -> str | None:
        return difference(folder, self.drafter)

    def written_as(self, form: str) -> Written:
        if form == NATIVE:
            return self
        base, found = self.reader.base, FORMATS[form]
        dropped = [] if self.source is None else self.source.drop_layers
        check_served(found.servers, Served(self.drafter, base, dropped), f"--as {form} is read by")
        return Exported(found, self._made())

    def _made(self) -> Made:
        base: Any = self.reader.base
        name = base.config.name_or_path if self.source is None else self.source.model
        folder = Path(name).expanduser()
        return Made(
            self.drafter,
            base.get_input_embeddings().weight.detach(),
            self.target.language.head(1.0).weight.detach(),
            str(folder.resolve()) if folder.is_dir() else name,
            tuple(base.config.architectures or (type(base).__name__,)),
            None if self.source is None else self.source.revision,
        )
