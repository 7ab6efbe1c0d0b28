"""Off-policy texts, on-policy blocks or not: a drafter's blocks at anchors placed in texts that are written already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from opd.choice import OneOf, kind_of
from opd.context import Context
from opd.drafting.base import Drafter
from opd.drafting.decoding import Speculation
from opd.drafting.placing import Anchors, Moved, Placed, Rule, Slots, Text, place
from opd.drafting.proposer import PROPOSER
from opd.drafting.target import Target as DraftTarget
from opd.drafting.tokens import draft_tokens
from opd.errors import IncompatibleError
from opd.language.engines.base import ids_of
from opd.language.engines.in_process import InProcess
from opd.language.tokens import Tokens
from opd.rollouts.base import Combination, HeldOutSampler, PrefixSource, Rollout, row_seed
from opd.rollouts.request import Request
from opd.rollouts.speculative import Speculative, SpeculativeRollout
from opd.rollouts.stored import StoredTrajectories
from opd.trajectories import AUTHORS, Author, Trajectories
from opd.weights import weights_hash

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class AnchoredRollout(Rollout):
    """Texts that are written already, with a drafter's blocks at anchors in them. With `slots: text` the blocks hold
    the text's own tokens: supervised training, of a `block` drafter as DFlash is fine-tuned, of a `chain` by
    training-time test (it reads its own outputs behind the first slot). With `slots: drafter` they hold what the
    drafter proposes there, and the text says how much of it stands: at `verified` anchors these are the blocks of
    speculative decoding that writes this text, found in a few passes over all of it. The target reads each text anew,
    and teaches every slot.

    Held-out texts are written by the target with the drafter's help, as `speculative` does; greedily, unless
    `evaluation.temperature` says otherwise."""

    kind: Literal["anchored"] = "anchored"
    modality: ClassVar[str | None] = "language"
    texts: Annotated[Rollout, OneOf(Rollout)] = Field(
        description="Where the texts come from, which the target should have written: `stored`, or `data`"
    )
    anchors: Anchors = Field(
        "verified",
        description="Where blocks begin: where speculative decoding with the drafter would verify, the verified "
        "segments in another order and at random places, `per_text` random places, or every place",
    )
    per_text: int | None = Field(
        None, ge=1, description="Anchors of a text, with anchors: uniform; all places where there are fewer"
    )
    slots: Slots = Field(
        "drafter", description="What stands in the blocks: the drafter's likeliest proposals, or the text's own tokens"
    )
    moved: Moved = Field(
        "accepted",
        description="With anchors: random and slots: drafter, which stream is at the random ones: what was accepted, "
        "as the text's tokens of each segment, while the rejected slots stay where they were; or all, as the drafter "
        "proposes there",
    )
    proposer: str = Field("current", description=PROPOSER)
    proposals: int | None = Field(None, ge=1, le=256, description="Tokens of a block; default the drafter's")
    batch: int = Field(64, ge=1, description="Texts read side by side")

    @field_validator("texts")
    @classmethod
    def _written(cls, value: Rollout) -> Rollout:
        if value.sampled or value.modality != "language" or isinstance(value, AnchoredRollout):
            raise ValueError(f"rollout {kind_of(value)!r} gives no texts that are written already; take stored or data")
        return value

    @field_validator("per_text")
    @classmethod
    def _of_uniform(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("anchors") == "uniform" and value is None:
            raise ValueError("anchors are 'uniform': say how many of a text, for instance per_text: 15")
        if info.data.get("anchors", "uniform") != "uniform" and value is not None:
            raise ValueError(f"anchors are {info.data['anchors']!r}, which has its own number; remove per_text")
        return value

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> Self:
        if self.moved == "both" and (self.anchors, self.slots) != ("random", "drafter"):
            raise ValueError("moved is 'both', which is for anchors: random with slots: drafter; remove the key")
        if self.proposer != "current" and not self.proposes:
            raise ValueError(
                f"proposer is {self.proposer!r}, and with slots: text and anchors: {self.anchors} nobody proposes; "
                "remove the key"
            )
        return self

    @property
    def proposes(self) -> bool:
        """Whether a drafter's proposals are asked for."""
        return self.slots == "drafter" or self.anchors in ("verified", "random")

    @property
    def alike(self) -> bool:
        """Never: a prompt may have several texts."""
        return False

    def blocks(self, tokens: int, acceptance: int) -> int:
        """Blocks in a text of so many tokens at a whole acceptance length."""
        if self.anchors == "every":
            return tokens
        if self.per_text is not None:
            return min(self.per_text, tokens)
        steps = -(-tokens // acceptance)
        both = self.anchors == "random" and self.slots == "drafter" and self.moved == "accepted"
        return 2 * steps if both else steps

    def check(self, drafter: Drafter) -> None:
        """Raise `IncompatibleError` where it asks for what the drafter does not allow."""
        self._plain.check(drafter)

    @property
    def _plain(self) -> SpeculativeRollout:
        """The same proposals along a text that is being written."""
        return SpeculativeRollout(proposals=self.proposals, proposer=self.proposer)

    @property
    def budget(self) -> int:
        return self.texts.budget

    @property
    def longest(self) -> int:
        return self.texts.longest

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> Anchored:
        target = getattr(student, "target", None)
        if not isinstance(target, DraftTarget):
            raise IncompatibleError(
                "rollout 'anchored' places a drafter's blocks in texts, and the student is no drafter: take "
                "student.kind draft, or as the rollout what stands in rollout.texts"
            )
        tokens = draft_tokens(context)
        texts = self.texts.build(
            context.with_(agreed=Tokens(tokens.written, tokens.end_ids)),
            cast("Student", _Reader(target.language)),
            teachers,
        )
        return Anchored(self, texts, self._plain.build(context, student, teachers))


@dataclass(frozen=True)
class _Reader:
    """All that a source of written texts asks of a student."""

    language: InProcess


class Anchored(Combination[AnchoredRollout]):
    """The built rollout; columns as those of `opd.rollouts.speculative.Speculative`. Slots that hold the text's tokens
    are accepted, as far as the text goes, and `data` is their author.

    Args:
        texts: where they come from.
        drafting: who proposes, verifies and teaches.
    """

    def __init__(self, settings: AnchoredRollout, texts: PrefixSource, drafting: Speculative):
        super().__init__([texts])
        self.drafting, self.target, self.dtype = drafting, drafting.target, drafting.dtype
        own: set[Author] = {"student"} if settings.slots == "drafter" else {"data"}
        if settings.slots == "drafter" and settings.anchors == "random" and settings.moved == "accepted":
            own.add("data")
        self.authors = frozenset(own)
        self.draws = False
        self.current, self.proposes, self.drafts = drafting.current, settings.proposes, True

    @property
    def notes(self) -> Sequence[str]:
        texts = self.sources[0]
        if not (self.proposes and isinstance(texts, StoredTrajectories)):
            return super().notes
        header = texts.store.header
        wrote = {header.student.get("weights"), *(writer["weights"] for writer in header.writers)}
        if weights_hash(self.target.language.model) in wrote:
            return super().notes
        return [
            *super().notes,
            f"the texts of {texts.store.path} were not written with the weights of student.target: a proposal that "
            "stands in them is not one that this target accepts",
        ]

    def held_out(self, settings: AnchoredRollout, context: Context, student: Student) -> HeldOutSampler:
        return self.drafting.held_out(SpeculativeRollout(proposals=settings.proposals), context, student)

    def drawn(self, request: Request[AnchoredRollout]) -> None:
        self.sources[0].drawn(request.to(request.settings.texts))

    @torch.no_grad()
    def __call__(self, request: Request[AnchoredRollout]) -> Trajectories:
        settings, context, group = request.settings, request.context, request.group
        if request.begun is not None:
            raise IncompatibleError(
                "rollout 'anchored' goes on from no other source's beginning; take it out of the switch"
            )
        found = self.sources[0](request.to(settings.texts))
        responses, finished = found.completions(), found.finished.tolist()
        texts = [
            Text(
                ids_of(found.contexts[i]).cpu(),
                responses[i].cpu(),
                finished[i],
                row_seed(context.seed, request.stream, prompt, group, i % group),
            )
            for i, prompt in enumerate(found.prompts)
        ]
        how = self.drafting.speculation(SpeculativeRollout(proposals=settings.proposals), context)
        rule = Rule(settings.anchors, settings.per_text or 0, settings.slots, settings.moved)
        training = how.drafter.training
        how.drafter.eval()
        # Texts of one length share a batch with little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].prompt) + len(texts[i].response))
        made: dict[int, Placed] = {}
        for start in range(0, len(order), settings.batch):
            here = order[start : start + settings.batch]
            made |= zip(here, place(rule, how, [texts[i] for i in here]), strict=True)
        how.drafter.train(training)
        placed = [made[i] for i in range(len(texts))]
        packed = self.drafting.packed(request, how, [each.answer for each in placed])
        return _in_streams(packed, placed, how)


def _in_streams(packed: Trajectories, placed: Sequence[Placed], how: Speculation) -> Trajectories:
    """Trajectories whose columns say of each block what is learnt of it. A slot with a token of the text that the
    drafter may not propose is in no loss."""
    device, count = packed.actions.device, how.proposals
    streams = [stream for each in placed for stream in each.streams]
    only_accepted, only_rejected = (
        torch.tensor([stream == name for stream in streams], dtype=torch.bool, device=device).repeat_interleave(count)
        for name in ("accepted", "rejected")
    )
    of_text = torch.cat([each.of_text for each in placed]).to(device).repeat_interleave(count)
    columns = dict(packed.columns)
    standing = columns["accepted"] | columns["corrected"]
    learn = packed.learn & ~(only_accepted & ~standing) & ~(only_rejected & columns["accepted"])
    learn &= ~(of_text & how.drafts.vocabulary.outside(packed.actions))
    columns["rejected"] = columns["rejected"] & ~only_accepted
    columns["corrected"] = columns["corrected"] & ~only_rejected
    columns["verified"] = columns["verified"].where(~only_rejected, -1)
    if bool(of_text.any()):
        del columns["log_q"]
    authors = packed.authors.where(~of_text, AUTHORS.index("data"))
    return replace(packed, learn=learn, columns=columns, authors=authors)
