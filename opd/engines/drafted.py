"""A drafter helps: the student's own weights verify what it proposes, and write what they write alone, only sooner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from opd.choice import Choice
from opd.context import Context
from opd.distributions import Vocabulary
from opd.drafting.base import Drafter
from opd.drafting.decoding import Speculation, speculate
from opd.drafting.native import load_drafter
from opd.drafting.proposing import Proposes
from opd.drafting.record import Drafted, saved
from opd.drafting.target import Target, draft_head
from opd.engines.base import RolloutEngine, Writer
from opd.errors import DataError, IncompatibleError, ModelError
from opd.language.engines.base import Drawing, EncodedPrompt, Ended, Engine, Looker, PromptInputs, Row
from opd.language.engines.in_process import InProcess
from opd.language.tokens import tokens_of
from opd.planning import Shape, bytes_text
from opd.prompts import Prompt

PLACE = "rollout.engine"


class DraftedEngine(Proposes, RolloutEngine):
    """A draft model proposes and the student verifies, in this process: the distribution that the student has alone, in
    fewer of its passes."""

    kind: Literal["drafted"] = "drafted"
    modality: ClassVar[str | None] = "language"
    here: ClassVar[bool] = True
    watched: ClassVar[bool] = False
    place: ClassVar[str] = PLACE
    shown: ClassVar[tuple[str, ...]] = ("engine/acceptance_length", "engine/passes_saved")
    model: str = Field(description="Folder of a drafter in its native format, made for the student")

    def told(self, student: Shape) -> str:
        weights = Path(self.model).expanduser() / "model.safetensors"
        size = f"{bytes_text(weights.stat().st_size)} of weights" if weights.is_file() else "weights"
        return f"{self.model} proposes to the student: its {size}, and what it keeps of texts, are not in the sums"

    def build(self, language: Engine, context: Context) -> DraftedWriter:
        """Load the drafter.

        Raises:
            ModelError: it was made for another model.
            IncompatibleError: it may propose what no text of the run holds, or not as it is asked to.
        """
        if not isinstance(language, InProcess):
            raise ModelError(f"{PLACE}: the student is no model in this process, so it cannot verify proposals")
        target = Target(language, which="the student")
        drafter = load_drafter(self.model, target.outline, language.head(1.0).detach(), f"{PLACE}.model")
        vocabulary = tokens_of(context).vocabulary
        unknown = next((i for i in drafter.ids or () if not vocabulary.holds(i)), None)
        if unknown is not None:
            raise IncompatibleError(
                f"{PLACE}.model {self.model}: it may propose id {unknown}, which no text of this run holds"
            )
        self.check(drafter)
        return DraftedWriter(self, language, drafter.to(context.device).requires_grad_(False).eval())


class DraftedWriter(Writer):
    """The built engine. The student may move: what verifies are its weights as they are."""

    def __init__(self, settings: DraftedEngine, language: InProcess, drafter: Drafter):
        self.settings, self.language, self.drafter = settings, language, drafter
        self.dtype = next(language.parameters()).dtype
        self.counted: Counter[str] = Counter()

    @torch.no_grad()
    def sample(
        self,
        contexts: Sequence[EncodedPrompt],
        group: int,
        budget: int,
        seeds: Sequence[int],
        drawing: Drawing,
        looker: Looker | None = None,
        ended: Ended | None = None,
    ) -> list[Row]:
        """As `Engine.sample`: with the likeliest proposals the same texts, up to the rounding of passes of other
        shapes."""
        assert looker is None, "who would look is refused with the recipe"
        texts: list[torch.Tensor] = []
        for prompt in contexts:
            if isinstance(prompt, PromptInputs):
                raise DataError(
                    f"{PLACE}: a prompt has {sorted(prompt.inputs)} besides text, and drafters read text alone; leave "
                    f"{PLACE} out"
                )
            texts += [prompt] * group
        # Rows of one length share a batch with little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, Row] = {}
        with self.language.quiet():
            how = self._speculation(drawing)
            for start in range(0, len(order), drawing.batch):
                here = order[start : start + drawing.batch]
                of_rows = ([texts[i] for i in here], [seeds[i] for i in here])
                for i, answer in zip(here, speculate(how, *of_rows, budget), strict=True):
                    text = answer.record.response.to(self.language.device)
                    found[i] = Row(text, answer.log_p.to(self.language.device), answer.finished)
                    self._count(answer.record)
                    if ended is not None:
                        ended(i, found[i])
        return [found[i] for i in range(len(found))]

    def _speculation(self, drawing: Drawing) -> Speculation:
        language, tokens = self.language, tokens_of(drawing.context)
        target = Target(language, self.drafter.taps, "the student")
        proposed = tokens.vocabulary if self.drafter.ids is None else Vocabulary.of(self.drafter.ids)
        return Speculation(
            target,
            self.drafter,
            language.head(1.0, tokens.vocabulary).detach(),
            draft_head(self.drafter, target, proposed, 1.0),
            tokens.end_ids,
            self.settings.proposals or self.drafter.proposals,
            drawing.context.temperature,
            self.settings.proposing,
            drawing.top_p,
            drawing.top_k,
            self.settings.tree,
        )

    def _count(self, record: Drafted) -> None:
        self.counted["answers"] += 1
        self.counted["steps"] += len(record.anchors)
        self.counted["committed"] += int(record.committed.sum())
        self.counted["tokens"] += len(record.response)

    def check_teachers(self, teachers: Sequence[Choice]) -> None:
        """It sends no weights."""

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        """What the student can write is checked where it is built."""

    def failures(self) -> Mapping[str, int]:
        return {}

    def own_signals(self) -> Mapping[str, float]:
        """`acceptance_length` and what was saved, of all that was written since, held-out answers too."""
        counted, self.counted = self.counted, Counter()
        if not counted:
            return {}
        found = saved(counted["answers"] + counted["steps"], counted["tokens"])
        if counted["steps"]:
            found["acceptance_length"] = counted["committed"] / counted["steps"]
        return {f"engine/{name}": value for name, value in found.items()}

    def close(self) -> None:
        """It holds nothing but memory."""
