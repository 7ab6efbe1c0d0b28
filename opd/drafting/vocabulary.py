"""Which ids a drafter may propose: the most frequent tokens of its target's texts."""

from __future__ import annotations

import torch
from pydantic import Field

from opd.choice import Settings
from opd.errors import DataError, ModelError
from opd.store.store import Store


class Frequent(Settings):
    """The ids that stand most often in the responses of a store; of ids that stand equally often the smaller first.
    Those that end a text are always among them."""

    size: int = Field(ge=1, le=10_000_000, description="How many")
    store: str = Field(description="Folder of a store that `opd rollout` wrote, of the target's texts")

    def ids(self, vocabulary: int) -> list[int]:
        """Ascending.

        Args:
            vocabulary: V, of the target.

        Raises:
            ModelError: the store has fewer ids than are wanted, or the ends of texts are more.
            DataError: it is not complete.
        """
        store = Store.open(self.store)
        if missing := store.missing():
            raise DataError(
                f"{self.store} is not complete, {len(missing)} of {store.header.shards} shards are missing; run opd "
                "rollout again, it goes on where it stopped"
            )
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        for shard in range(store.header.shards):
            actions = store.shard(shard).tensor("actions").long()
            if len(actions) and int(actions.max()) >= vocabulary:
                raise ModelError(
                    f"student.drafter.vocabulary.store {self.store} holds id {int(actions.max())}, and the target's "
                    f"ids end at {vocabulary - 1}: take a store of its own texts"
                )
            counts += torch.bincount(actions, minlength=vocabulary)
        every = torch.arange(vocabulary)
        possible = ~store.header.covered().outside(every)
        ends = torch.tensor([i for i in store.header.end_ids if i < vocabulary], dtype=torch.int64)
        ends = ends[possible[ends]]
        if not len(ends) <= self.size <= int(possible.sum()):
            raise ModelError(
                f"student.drafter.vocabulary.size is {self.size}, and the texts of {self.store} may hold "
                f"{int(possible.sum())} ids, {len(ends)} of which end them: take a number between these two"
            )
        counts[~possible], counts[ends] = -1, torch.iinfo(torch.int64).max
        # A stable sort keeps equals in the order of their ids.
        best = counts.sort(descending=True, stable=True).indices[: self.size]
        found: list[int] = best.sort().values.tolist()
        return found
