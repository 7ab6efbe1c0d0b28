"""Off-policy: trajectories that `opd rollout` wrote to a store, an earlier student's or a teacher's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from opd.context import Context
from opd.errors import DataError, IncompatibleError
from opd.language.engines.in_process import InProcess, language_of
from opd.language.tokens import tokens_of
from opd.prompts import Prompt
from opd.rollouts.base import OneSource, PrefixSource
from opd.rollouts.request import Request
from opd.rollouts.turns import Turns
from opd.schedules import OverSteps
from opd.store.store import Store, StoreHeader
from opd.trajectories import Trajectories

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher


class StoredRollout(OneSource):
    """Exact ids from a store, by the prompt's id. The trajectories of a prompt take turns: each visit of the prompt,
    by whatever curriculum and process, takes the next `batch.group` of them. `shuffled` passes over the store in a new
    order each epoch. Pictures of prompts are read again, and must be as they were."""

    kind: Literal["stored"] = "stored"
    modality: ClassVar[str | None] = "language"
    path: str = Field(description="The store's folder")
    max_new_tokens: Annotated[int, OverSteps(ge=1, le=10_000_000)] = Field(
        4096, description="Longest beginning of a stored trajectory that is learnt from"
    )

    @property
    def budget(self) -> int:
        return min(super().budget, self.held)

    @property
    def longest(self) -> int:
        return min(super().longest, self.held)

    @property
    def held(self) -> int:
        """Most actions of a row, where the store is on this machine; else no bound."""
        header = Path(self.path) / "store.json"
        return StoreHeader.read(header).budget if header.is_file() else sys.maxsize

    @property
    def from_store(self) -> bool:
        return True

    @property
    def sampled(self) -> int:
        return 0

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> StoredTrajectories:
        return StoredTrajectories(self, language_of(student, "the student"), context)


class StoredTrajectories(PrefixSource[StoredRollout]):
    """The built source."""

    current = False

    def __init__(self, settings: StoredRollout, language: InProcess, context: Context):
        self.settings, self.language, self.context = settings, language, context
        self.store = Store.open(settings.path)
        header = self.store.header
        self.authors = frozenset(header.authors)
        self.turns = Turns()
        missing = self.store.missing()
        if missing:
            raise DataError(
                f"{settings.path} is not complete, {len(missing)} of {header.shards} shards are "
                "missing; run opd rollout again, it goes on where it stopped"
            )
        refuse = f"the store {settings.path} was made with another"
        if language.tokenizer_hash != header.tokenizer:
            raise IncompatibleError(f"{refuse} tokenizer than the student has; take the student that sampled it")
        if language.template_hash != header.template:
            raise IncompatibleError(
                f"{refuse} template; set student.template and student.template_options as when it was sampled"
            )
        self.store.check_reader(language)
        ends = tokens_of(context).end_ids
        if set(ends) != set(header.end_ids):
            raise IncompatibleError(
                f"{refuse} end token, {header.end_ids} and now {list(ends)}; set end_tokens={header.end_ids}"
            )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        header = self.store.header
        wider = header.covered() != tokens_of(self.context).vocabulary
        for prompt in prompts:
            if prompt.id not in self.store.index:
                raise DataError(
                    f"{prompt.where}: prompt {prompt.id!r} has no trajectory in {self.settings.path}; take the prompts "
                    "that it was sampled from"
                )
            self.store.check_prompt(prompt, self.language.encode(prompt))
            for row in self.store.rows_of(prompt.id) if wider else ():
                if bool(tokens_of(self.context).vocabulary.outside(self.store.actions(row)).any()):
                    raise DataError(
                        f"{prompt.where}: a trajectory of prompt {prompt.id!r} in {self.settings.path} holds a token "
                        "that not every tokenizer of this run has; leave the prompt out, or sample the store again"
                    )

    def __call__(self, request: Request[StoredRollout]) -> Trajectories:
        if request.begun is not None:
            raise IncompatibleError("a stored trajectory cannot go on what another source began; put it first")
        group, rows = request.group, list[int]()
        for prompt in request.prompts:
            mine = self.store.rows_of(prompt.id)
            turn = self.turns.of(prompt, request.stream)
            rows += [mine[(turn * group + member) % len(mine)] for member in range(group)]
        members = [prompt for prompt in request.prompts for _ in range(group)]
        longest = min(request.budget, request.settings.max_new_tokens)
        return self.store.trajectories(rows, members, request.context.device, longest, self.language)

    def exact(self, settings: StoredRollout) -> bool:
        return False

    def drawn(self, request: Request[StoredRollout]) -> None:
        self.turns.drawn(request.prompts)

    def state_dict(self) -> dict[str, Any]:
        return self.turns.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns.load_state_dict(state)

    def written_before(self, prompts: Sequence[Prompt], budget: int) -> Trajectories | None:
        known = [prompt for prompt in prompts if prompt.id in self.store.index]
        if not known or self.authors != {"student"}:
            return None
        rows = [self.store.rows_of(prompt.id)[0] for prompt in known]
        return self.store.trajectories(rows, known, self.context.device, budget, self.language)

    def teachers(self) -> list[str]:
        return [writer["weights"] for writer in self.store.header.writers]
