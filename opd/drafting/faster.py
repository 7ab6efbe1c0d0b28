"""A drafter at the service of a rollout: the model that writes stays the one that it is, and writes sooner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from opd.choice import Settings
from opd.context import Context
from opd.distributions import Vocabulary
from opd.drafting.base import Drafter
from opd.drafting.decoding import Proposing, Speculation, speculate
from opd.drafting.native import load_drafter
from opd.drafting.target import Target, draft_head
from opd.errors import DataError, IncompatibleError
from opd.language.engines.base import Drawing, EncodedPrompt, PromptInputs, Row
from opd.language.engines.in_process import InProcess
from opd.language.tokens import tokens_of


class Helped(Settings):
    """A drafter that proposes to the model that writes."""

    model: str = Field(description="Folder of a drafter in its native format, made for the model that writes")
    proposals: int | None = Field(None, ge=1, le=256, description="Tokens of a block; default the drafter's")
    proposing: Proposing = Field(
        "likeliest", description="Whether a slot's likeliest token is proposed, or one drawn from the drafter"
    )

    def build(self, language: InProcess, context: Context, which: str) -> Drafting:
        """Load the drafter for a built model, which messages call `which`.

        Raises:
            ModelError: it was made for another model.
            IncompatibleError: it may propose what no text of the run holds, or not as it is asked to.
        """
        target = Target(language, which=which)
        drafter = load_drafter(self.model, target.outline, language.head(1.0).detach(), "rollout.drafter.model")
        vocabulary = tokens_of(context).vocabulary
        unknown = next((i for i in drafter.ids or () if not vocabulary.holds(i)), None)
        if unknown is not None:
            raise IncompatibleError(
                f"rollout.drafter {self.model}: it may propose id {unknown}, which no text of this run holds"
            )
        if self.proposals is not None and drafter.most is not None and self.proposals > drafter.most:
            raise IncompatibleError(
                f"rollout.drafter.proposals is {self.proposals}, and this drafter proposes {drafter.most} at most"
            )
        if self.proposing == "drawn" and drafter.parallel:
            raise IncompatibleError(
                "rollout.drafter.proposing is 'drawn', and the slots of this drafter do not see each other: drawn "
                "apart they are no text. Leave it at 'likeliest'"
            )
        return Drafting(self, drafter.to(context.device).requires_grad_(False).eval(), which)


class Drafting:
    """The built helper. The model that writes may move: what it verifies with are its weights as they are."""

    def __init__(self, settings: Helped, drafter: Drafter, which: str):
        self.settings, self.drafter, self.which = settings, drafter, which

    @torch.no_grad()
    def sample(
        self,
        engine: InProcess,
        contexts: Sequence[EncodedPrompt],
        group: int,
        budget: int,
        seeds: Sequence[int],
        drawing: Drawing,
    ) -> list[Row]:
        """As `Engine.sample`: with the likeliest proposals the same texts, up to the rounding of passes of other
        shapes."""
        texts: list[torch.Tensor] = []
        for prompt in contexts:
            if isinstance(prompt, PromptInputs):
                raise DataError(
                    f"rollout.drafter: a prompt has {sorted(prompt.inputs)} besides text, and drafters read text "
                    "alone; leave rollout.drafter out"
                )
            texts += [prompt] * group
        # Rows of one length share a batch with little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, Row] = {}
        with engine.quiet():
            how = self._speculation(engine, drawing)
            for start in range(0, len(order), drawing.batch):
                here = order[start : start + drawing.batch]
                for i, answer in zip(
                    here, speculate(how, [texts[i] for i in here], [seeds[i] for i in here], budget), strict=True
                ):
                    text = answer.record.response.to(engine.device)
                    found[i] = Row(text, answer.log_p.to(engine.device), answer.finished)
        return [found[i] for i in range(len(found))]

    def _speculation(self, engine: InProcess, drawing: Drawing) -> Speculation:
        target, tokens = Target(engine, self.drafter.taps, self.which), tokens_of(drawing.context)
        proposed = tokens.vocabulary if self.drafter.ids is None else Vocabulary.of(self.drafter.ids)
        return Speculation(
            target,
            self.drafter,
            engine.head(1.0, tokens.vocabulary).detach(),
            draft_head(self.drafter, target, proposed, 1.0),
            tokens.end_ids,
            self.settings.proposals or self.drafter.proposals,
            drawing.context.temperature,
            self.settings.proposing,
            drawing.top_p,
            drawing.top_k,
        )
