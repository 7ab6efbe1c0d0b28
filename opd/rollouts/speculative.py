"""Speculative decoding: the target writes, the drafter proposes, and every block that the target verified is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.drafting.base import Drafter
from opd.drafting.decoding import Answer, Speculation, speculate
from opd.drafting.packing import packed
from opd.drafting.proposer import PROPOSER, blocks_for, proposer_of
from opd.drafting.proposing import Proposes
from opd.drafting.target import Target as DraftTarget
from opd.drafting.target import draft_head
from opd.drafting.tokens import draft_tokens
from opd.errors import IncompatibleError
from opd.language.engines.base import ids_of
from opd.planning import Shape
from opd.rollouts.base import C, HeldOutSampler, OneSource, PrefixSource, Sampling, row_seed
from opd.rollouts.request import Request
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class SpeculativeRollout(Proposes, OneSource):
    """Lossless speculative decoding with the drafter as it is now. A trajectory is an answer of the target, and its
    positions are the slots of all blocks that were proposed for it, accepted or not; columns say which is which. The
    target's answer at each slot comes along, behind rejections too (Draft-OPD, arXiv 2605.29343)."""

    kind: Literal["speculative"] = "speculative"
    modality: ClassVar[str | None] = "language"
    place: ClassVar[str] = "rollout"
    shown: ClassVar[tuple[str, ...]] = ("acceptance_length", "passes_saved")
    text_temperature: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Of the target's text, 0 the likeliest; the recipe's is the loss's, on both sides",
    )
    proposer: str = Field("current", description=PROPOSER)
    batch: int = Field(64, ge=1, description="Answers written side by side")

    @property
    def alike(self) -> bool:
        return self.text_temperature == 0

    def samplers(
        self, student: Shape, teachers: Sequence[tuple[str | None, Sequence[Shape]]]
    ) -> Iterator[tuple[Sampling, Shape]]:
        yield from ()

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> Speculative:
        target, drafter = getattr(student, "target", None), getattr(student, "module", None)
        if not (isinstance(target, DraftTarget) and isinstance(drafter, Drafter)):
            raise IncompatibleError(
                "rollout 'speculative' lets a drafter propose, and the student is none: take student.kind draft"
            )
        name = next((t.settings.name for t in teachers if getattr(t, "target", None) is target), None)
        asked = any(getattr(t, "target", None) is target for t in teachers)
        proposer = proposer_of(self.proposer, drafter, target)
        self.check(proposer)
        blocks_for(self.proposer, self.proposals or proposer.proposals, drafter)
        made = Speculative(target, proposer, asked, name, drafter)
        made.draws = self.proposing == "drawn" and self.text_temperature == context.temperature
        return made


class Speculative(PrefixSource[SpeculativeRollout]):
    """The built rollout. Of a tree the slots of one line are kept (`opd.drafting.tree.Line`): those that stand, and the
    likeliest children behind the last of them, which do not.

    Columns are those of `opd.drafting.packing.packed`, `log_q` where the drafter that is trained proposes.

    Args:
        drafter: who proposes.
        asked: whether the target teaches, under the `name`.
        trained: the drafter that is trained; default the same.
    """

    def __init__(
        self, target: DraftTarget, drafter: Drafter, asked: bool, name: str | None, trained: Drafter | None = None
    ):
        self.target, self.drafter, self.asked, self.name = target, drafter, asked, name
        self.drafts = True
        self.trained = drafter if trained is None else trained
        self.current = self.trained is drafter
        self.dtype = next(target.language.parameters()).dtype

    def exact(self, settings: SpeculativeRollout) -> bool:
        """Never: proposals are drawn at the text's temperature, by a rule of their own."""
        return False

    def held_out(self, settings: SpeculativeRollout, context: Context, student: Student) -> HeldOutSampler:
        """The drafter that is trained proposes, whoever does elsewhere."""
        return HeldOutSampler(Speculative(self.target, self.trained, self.asked, self.name), settings, context)

    @torch.no_grad()
    def __call__(self, request: Request[SpeculativeRollout]) -> Trajectories:
        settings, context, group = request.settings, request.context, request.group
        if request.begun is not None:
            raise IncompatibleError(
                "rollout 'speculative' goes on from no other source's beginning; take it out of the switch"
            )
        training = self.drafter.training
        self.drafter.eval()
        how = self.speculation(settings, context)
        prompts = [prompt for prompt in request.prompts for _ in range(group)]
        ids = [ids_of(self.target.language.encode(prompt)) for prompt in request.prompts]
        texts = [each for each in ids for _ in range(group)]
        of = (context.seed, request.stream)
        seeds = [row_seed(*of, prompt, group, i % group) for i, prompt in enumerate(prompts)]
        answers: list[Answer] = []
        for start in range(0, len(texts), settings.batch):
            here = slice(start, start + settings.batch)
            answers += speculate(how, texts[here], seeds[here], request.budget)
        self.drafter.train(training)
        return self.packed(request, how, answers)

    def speculation(self, settings: SpeculativeRollout, context: Context) -> Speculation:
        """How a step's answers are written."""
        tokens = draft_tokens(context)
        written = self.target.language.head(1.0, tokens.written)
        drafts = draft_head(self.drafter, self.target, tokens.vocabulary, 1.0)
        return Speculation(
            self.target,
            self.drafter,
            written.detach(),
            drafts.detach(),
            tokens.end_ids,
            settings.proposals or self.drafter.proposals,
            settings.text_temperature,
            settings.proposing,
            tree=settings.tree,
        )

    def packed(self, request: Request[C], how: Speculation, answers: Sequence[Answer]) -> Trajectories:
        """The trajectories of answers to a request's prompts, in their order."""
        context = request.context
        head = self.target.language.head(context.temperature, draft_tokens(context).vocabulary).detach()
        prompts = [prompt for prompt in request.prompts for _ in range(request.group)]
        made = packed(how.written, answers, prompts, request.group, head, self.name)
        columns = {name: column for name, column in made.columns.items() if self.current or name != "log_q"}
        return replace(made, columns=columns, answers=made.answers if self.asked else None)
