"""A drafter helps: the student's own weights verify what it proposes, and write what they write alone, only sooner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.choice import Choice
from opd.context import Context
from opd.distributions import Vocabulary
from opd.drafting.base import Drafter
from opd.drafting.decoding import Answer, Speculation, speculate
from opd.drafting.learning import Learner, Learning
from opd.drafting.native import load_drafter, save_drafter
from opd.drafting.packing import packed
from opd.drafting.proposing import Proposes
from opd.drafting.record import Drafted, saved
from opd.drafting.target import Target, draft_head
from opd.engines.base import RolloutEngine, Writer
from opd.errors import DataError, IncompatibleError, ModelError, RunError
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
    train: Learning | None = Field(
        None,
        description="How the drafter learns from what the student verified while it wrote; default: it stays as it is",
    )

    def told(self, student: Shape) -> str:
        weights = Path(self.model).expanduser() / "model.safetensors"
        size = f"{bytes_text(weights.stat().st_size)} of weights" if weights.is_file() else "weights"
        learns = "" if self.train is None else ", four times that while it is trained"
        what = f"its {size}{learns}, and what it keeps of texts"
        return f"{self.model} proposes to the student: {what}, are not in the sums"

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
        drafter = drafter.to(context.device).requires_grad_(self.train is not None).eval()
        return DraftedWriter(self, language, drafter if self.train is None else drafter.float(), vocabulary)


class DraftedWriter(Writer):
    """The built engine. The student may move: what verifies are its weights as they are."""

    def __init__(self, settings: DraftedEngine, language: InProcess, drafter: Drafter, written: Vocabulary):
        self.settings, self.language, self.drafter, self.written = settings, language, drafter, written
        self.proposed = written if drafter.ids is None else Vocabulary.of(drafter.ids)
        self.dtype = next(language.parameters()).dtype
        self.counted: Counter[str] = Counter()
        self.learner = None if settings.train is None else Learner(settings.train, drafter)
        self.learnt: dict[str, float] = {}
        self._answers: list[Answer] = []

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
            keeps = drawing.training and self.learner is not None
            for start in range(0, len(order), drawing.batch):
                here = order[start : start + drawing.batch]
                of_rows = ([texts[i] for i in here], [seeds[i] for i in here])
                for i, answer in zip(here, speculate(how, *of_rows, budget), strict=True):
                    text = answer.record.response.to(self.language.device)
                    found[i] = Row(text, answer.log_p.to(self.language.device), answer.finished)
                    self._count(answer.record)
                    self._answers += [answer] if keeps else []
                    if ended is not None:
                        ended(i, found[i])
        return [found[i] for i in range(len(found))]

    def _speculation(self, drawing: Drawing) -> Speculation:
        language, tokens = self.language, tokens_of(drawing.context)
        target = Target(language, self.drafter.taps, "the student")
        return Speculation(
            target,
            self.drafter,
            language.head(1.0, self.written).detach(),
            draft_head(self.drafter, target, self.proposed, 1.0).detach(),
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

    def learn(self, settings: RolloutEngine, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        answers, self._answers = self._answers, []
        if self.learner is None:
            return
        assert isinstance(settings, DraftedEngine)
        assert settings.train is not None
        written, proposed = (self.language.head(1.0, ids).detach() for ids in (self.written, self.proposed))
        prompts = [Prompt(str(i), {}) for i in range(len(answers))]
        made = packed(written, answers, prompts, 1, proposed, None)
        target = Target(self.language, self.drafter.taps, "the student")
        found = self.learner.learn(settings.train, target, self.proposed, made, sum_over_processes)
        self.learnt = found

    def state_dict(self) -> dict[str, Any]:
        return {} if self.learner is None else self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.learner is None:
            super().load_state_dict(state)
        elif not state:
            raise RunError(
                f"{PLACE}.train is set, and the checkpoint holds no drafter; remove it, or start another run from the "
                "saved student"
            )
        else:
            self.learner.load_state_dict(state)

    def beside(self) -> Mapping[str, Callable[[Path], None]]:
        return {} if self.learner is None else {"drafter": self._save}

    def _save(self, folder: Path) -> None:
        embedding: Any = self.language.base.get_input_embeddings()
        save_drafter(folder, self.drafter, embedding.weight)

    def check_teachers(self, teachers: Sequence[Choice]) -> None:
        """It sends no weights."""

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        """What the student can write is checked where it is built."""

    def failures(self) -> Mapping[str, int]:
        return {}

    def own_signals(self) -> Mapping[str, float]:
        """`acceptance_length` and what was saved, of all that was written since, held-out answers too; and of the
        drafter's own step its loss and the norm of its gradient."""
        counted, self.counted = self.counted, Counter()
        learnt, self.learnt = self.learnt, {}
        if not counted:
            return {}
        found = learnt | saved(counted["answers"] + counted["steps"], counted["tokens"])
        if counted["steps"]:
            found["acceptance_length"] = counted["committed"] / counted["steps"]
        return {f"engine/{name}": value for name, value in found.items()}

    def close(self) -> None:
        """It holds nothing but memory."""
