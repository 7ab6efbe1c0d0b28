"""Rows written in places of which there is a fixed number: those that ended make room for others, and who looks at them
between segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from opd.language.engines.base import EncodedPrompt, Look, Looker, Row, Written
from opd.language.engines.sampler import Sampler, Sampling

REFILL = 4
"""Rows join once one part in so many of the places is free: not one by one, since every prefill is a pass, and not
when most places stand empty. `python -m benchmarks.pruning --part rollouts` compares it with whole waves."""


@dataclass(eq=False)
class Batch:
    """Rows that began together, neighbours in a sampling's tables.

    Attributes:
        rows: their indices among all that were asked for.
        look: who looks at them.
        stopped: reasons by place, of those that it ended.
    """

    rows: Sequence[int]
    look: Look | None = None
    stopped: dict[int, str] = field(default_factory=dict)


class Batches:
    """All rows that are being written.

    Args:
        budget: most tokens of a row.
        group: rows of one prompt, which begin together.
        places: rows side by side, a multiple of the group.

    Attributes:
        open: the batches of which a row is being written, in the order of the sampling's tables.
    """

    def __init__(self, sampler: Sampler, looker: Looker | None, budget: int, group: int, places: int):
        self.sampler, self.looker, self.budget = sampler, looker, budget
        self.group, self.places = group, places
        self.state: Sampling | None = None
        self.open: list[Batch] = []

    def free(self, waiting: int) -> int:
        """Places that some of `waiting` rows should take now: none before it pays, or, where rows cannot join, before
        all others have ended."""
        free = self.places - (len(self.state.alive) if self.state is not None else 0)
        return min(free, waiting) if free >= self._enough(waiting) else 0

    def begin(self, rows: Sequence[int], contexts: Sequence[EncodedPrompt], seeds: Sequence[int]) -> None:
        """Put a batch into free places: `rows`, a group of each prompt."""
        new = self.sampler.start(contexts, self.group, self.budget, seeds)
        if self.state is not None and len(self.state.alive):
            self.state.join(new)
        else:
            self.state = new
        self.open.append(Batch(rows))
        if self.looker is not None:
            self.open[-1].look = self.looker.begin(self._written()[-1])

    def extend(self, waiting: int) -> dict[int, Row]:
        """Draw a segment, or where nobody looks until places are free for `waiting` rows. The rows, by index, of the
        batches that are done then."""
        state, looker = self.state, self.looker
        assert state is not None
        if looker is None:
            self.sampler.extend(state, self.budget, self.places - self._enough(waiting) if waiting else 0)
        else:
            self.sampler.extend(state, looker.segment)
            self._look(state)
        found: dict[int, Row] = {}
        for batch, written in zip(list(self.open), self._written(), strict=True):
            if not written.going:
                if batch.look is not None:
                    batch.look.end(written)
                found |= self._done(state, batch)
        return found

    def _enough(self, waiting: int) -> int:
        """How many places have to be free for rows to join."""
        if not self.sampler.joins:
            return self.places
        groups = self.places // self.group
        return min(-(-groups // REFILL) * self.group, waiting)

    def _look(self, state: Sampling) -> None:
        """Have everybody look at their rows, and end some."""
        first = 0
        ended: list[int] = []
        for batch, written in zip(self.open, self._written(), strict=True):
            if batch.look is not None and written.going:
                going = set(written.going)
                reasons = {place: why for place, why in batch.look.look(written).items() if place in going}
                batch.stopped |= reasons
                ended += [first + place for place in reasons]
            first += len(batch.rows)
        state.drop(torch.tensor(ended, dtype=torch.int64))

    def _done(self, state: Sampling, batch: Batch) -> dict[int, Row]:
        """A batch's rows; the sampling lets go of them."""
        first = sum(len(other.rows) for other in self.open[: self.open.index(batch)])
        own = slice(first, first + len(batch.rows))
        # Slices of the tables would keep the whole of them.
        drawn = [(actions.clone(), log_probs.clone(), ended) for actions, log_probs, ended in state.rows()[own]]
        state.forget(own.start, own.stop)
        self.open.remove(batch)
        return {
            row: Row(*of, batch.stopped.get(place))
            for place, (row, of) in enumerate(zip(batch.rows, drawn, strict=True))
        }

    def _written(self) -> list[Written]:
        """What there is of each open batch."""
        assert self.state is not None
        drawn, candidates, alive = self.state.rows(), self.state.candidates(), self.state.alive.tolist()
        found, first = [], 0
        for batch in self.open:
            own = slice(first, first + len(batch.rows))
            going = sorted(i - first for i in alive if own.start <= i < own.stop)
            actions, log_probs = [row[0] for row in drawn[own]], [row[1] for row in drawn[own]]
            found.append(Written(batch.rows, actions, log_probs, going, candidates[own]))
            first = own.stop
        return found
