"""Off-policy for policies that act: the states and actions of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from opd.acting.episode import Episode, Played, pack
from opd.acting.lerobot import Demonstration, open_demonstrations
from opd.acting.model import ActionModel, policy_of
from opd.context import Context
from opd.errors import DataError, IncompatibleError
from opd.prompts import Prompt
from opd.rollouts.base import PrefixSource, Rollout, row_seed
from opd.rollouts.request import Request
from opd.trajectories import Author, Trajectories

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher

COLUMNS = ("dataset", "episode")


class DemonstrationRollout(Rollout):
    """Each row's episode, cut into chunks from a first frame that is drawn anew each time: its states, and at each the
    H actions that were done there. With `objective: sft` that is behaviour cloning; with a divergence and a teacher of
    kind policy it compares on an expert's states. Tokens behind the last frame are not learnt from."""

    kind: Literal["demonstrations"] = "demonstrations"
    modality: ClassVar[str | None] = "action"
    decisions: int = Field(64, ge=1, le=10_000, description="Most chunks of an episode, from its first frame on")
    author: Literal["data", "teacher"] = Field("data", description="Who acted, for objectives that ask")

    @property
    def budget(self) -> int:
        return self.decisions

    @property
    def sampled(self) -> int:
        return 0

    def build(self, context: Context, student: Student, teachers: Sequence[LiveTeacher]) -> Demonstrations:
        return Demonstrations(self, policy_of(student, "the student"))


@lru_cache(maxsize=4096)
def episode_of(path: str, place: int) -> Demonstration:
    """An episode of a data set, kept once it was read."""
    return open_demonstrations(path).read(place)


class Demonstrations(PrefixSource[DemonstrationRollout]):
    """The built source. Nothing is drawn from a model: log-probabilities are not known and stand as 0."""

    def __init__(self, settings: DemonstrationRollout, model: ActionModel):
        self.model = model
        author: Author = settings.author
        self.authors = frozenset({author})

    def exact(self, settings: DemonstrationRollout) -> bool:
        return False

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        layout = self.model.layout
        for prompt in prompts:
            lacking = next((column for column in COLUMNS if column not in prompt.fields), None)
            if lacking is not None:
                raise DataError(
                    f"{prompt.where}: no column {lacking!r}, so no demonstration stands in this row; take prompts of "
                    "kind demonstrations"
                )
            found = self._episode(prompt)
            first = found.seen[0]
            shown = (found.actions.shape[1], *first.images.shape[:2], len(first.proprio), len(first.state))
            wanted = (layout.dimensions, layout.cameras, layout.pixels, layout.proprio, layout.state)
            names = ("numbers of an action", "cameras", "pixels", "proprio numbers", "state numbers")
            for i, (name, own, theirs) in enumerate(zip(names, wanted, shown, strict=True)):
                if own != theirs and (own or i == 0):
                    raise DataError(f"{prompt.where}: the policy reads {own} {name} and the data set has {theirs}")

    def _episode(self, prompt: Prompt) -> Demonstration:
        return episode_of(str(prompt.fields["dataset"]), int(prompt.fields["episode"]))

    def __call__(self, request: Request[DemonstrationRollout]) -> Trajectories:
        if request.begun is not None:
            raise IncompatibleError("rollout 'demonstrations' cannot go on what another source began")
        layout, rows = self.model.layout, []
        for prompt in request.prompts:
            episode = self._episode(prompt)
            ids = layout.actions.encode(self.model.statistics.scale(episode.actions))
            for member in range(request.group):
                seed = row_seed(request.context.seed, request.stream, prompt, request.group, member)
                first = seed % min(layout.chunk, len(ids))
                places = range(first, len(ids), layout.chunk)[: request.budget]
                rows.append(self._cut(str(prompt.view()), episode, ids, places))
        return pack(request.prompts, request.group, rows, request.settings.author)

    def _cut(self, instruction: str, episode: Demonstration, ids: np.ndarray, places: range) -> Played:
        """The chunks that begin at `places`."""
        chunk = self.model.layout.chunk
        # Behind the end the last action stands again, and nobody learns from it.
        index = np.array(places)[:, None] + np.arange(chunk)
        taken = torch.from_numpy(ids[index.clip(max=len(ids) - 1)]).flatten()
        learn = torch.from_numpy(np.broadcast_to((index < len(ids))[..., None], (*index.shape, ids.shape[1])).copy())
        return Played(
            Episode(instruction, [episode.seen[i] for i in places], float(episode.success), len(ids)),
            taken,
            torch.zeros(len(taken)),
            learn.flatten(),
            True,
        )
