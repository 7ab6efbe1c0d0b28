"""Off-policy: completions that stand in the prompt set, a person's or a teacher's from an earlier day."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.errors import DataError
from opd.language.encoding import turn_end
from opd.language.engines.base import Row
from opd.language.engines.in_process import InProcess, language_of
from opd.language.rollout import pack_rows
from opd.language.tokens import tokens_of
from opd.prompts import Prompt
from opd.rollouts.base import OneSource, PrefixSource
from opd.rollouts.request import Request
from opd.rollouts.turns import Turns
from opd.trajectories import Author, Trajectories

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class DataRollout(OneSource):
    """The response in a column of the prompt's row: text, or a list of texts for a group. The end token is appended,
    unless the budget cuts the response before: the one with which the chat template ends an answer, or the tokenizer's.
    """

    kind: Literal["data"] = "data"
    modality: ClassVar[str | None] = "language"
    column: str = Field("response", description="Column with the response, or a list of responses")
    author: Literal["data", "teacher"] = Field("data", description="Who wrote them, for objectives that ask")

    @property
    def sampled(self) -> int:
        return 0

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> StoredResponses:
        return StoredResponses(self, language_of(student, "the student"), context)


class StoredResponses(PrefixSource[DataRollout]):
    """The built source. Nothing is drawn: its log-probabilities are not known and stand as 0."""

    def __init__(self, settings: DataRollout, language: InProcess, context: Context):
        self.settings, self.language, self.context = settings, language, context
        author: Author = settings.author
        self.authors = frozenset({author})
        self.turns = Turns()
        self.end = self._end()

    def _end(self) -> int:
        """The id that is put behind a response: that of the chat template, or else the tokenizer's, if completions of
        this run end with it."""
        ends = torch.tensor(sorted(tokens_of(self.context).end_ids))
        possible: list[int] = ends[~tokens_of(self.context).vocabulary.outside(ends)].tolist() or ends.tolist()
        named = (turn_end(self.language), self.language.tokenizer.eos_token_id)
        return next((i for i in named if i is not None and i in possible), possible[0])

    def responses(self, prompt: Prompt) -> list[str]:
        """The texts of one row."""
        found: Any = prompt.view(self.settings.column)
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise DataError(
                f"{prompt.where}: column {self.settings.column!r} holds {type(found).__name__}; rollout 'data' takes a "
                "text or a list of texts"
            )
        return texts

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        tokenizer = self.language.tokenizer
        for prompt in prompts:
            for text in self.responses(prompt):
                ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
                early = [i for i in ids[:-1].tolist() if i in tokens_of(self.context).end_ids]
                if early:
                    raise DataError(
                        f"{prompt.where}: the response in column {self.settings.column!r} holds "
                        f"{tokenizer.convert_ids_to_tokens(early[0])!r} before its end, where a completion of this run "
                        "ends; remove it"
                    )
                outside = ids[tokens_of(self.context).vocabulary.outside(ids)]
                if len(outside):
                    raise DataError(
                        f"{prompt.where}: the response in column {self.settings.column!r} holds "
                        f"{tokenizer.convert_ids_to_tokens(int(outside[0]))!r}, which not every tokenizer of the run "
                        "has; remove it, or the row"
                    )

    def exact(self, settings: DataRollout) -> bool:
        return False

    def drawn(self, request: Request[DataRollout]) -> None:
        self.turns.drawn([prompt for prompt in request.prompts if len(self.responses(prompt)) > 1])

    def state_dict(self) -> dict[str, Any]:
        return self.turns.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns.load_state_dict(state)

    def encode(self, text: str, budget: int, skip: int = 0) -> Row:
        """One response from its token `skip` on, with zeros for log-probabilities."""
        ids = list(self.language.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = ids if ids and ids[-1] in tokens_of(self.context).end_ids else [*ids, self.end]
        cut = ids[skip : skip + budget]
        actions = torch.tensor(cut or [self.end], dtype=torch.int64, device=self.language.device)
        return Row(actions, torch.zeros(len(actions), device=actions.device), skip + budget >= len(ids))

    def __call__(self, request: Request[DataRollout]) -> Trajectories:
        prompts, group, begun, rows = request.prompts, request.group, request.begun, []
        for i, prompt in enumerate(prompts):
            texts, turn = self.responses(prompt), self.turns.of(prompt, request.stream)
            for g in range(group):
                skip = len(begun[i * group + g]) if begun is not None else 0
                # With fewer responses than members, and over the visits of a prompt, they take turns.
                rows.append(self.encode(texts[(turn * group + g) % len(texts)], request.budget, skip))
        contexts = [self.language.encode(p) for p in prompts]
        return pack_rows(prompts, contexts, group, rows, self.settings.author)
