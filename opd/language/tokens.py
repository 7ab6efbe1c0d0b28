"""What students and teachers of language agree on before a run: which tokens there are, and which end a completion."""

from __future__ import annotations

from dataclasses import dataclass

from opd.context import Agreement, Context
from opd.distributions import EVERY_ID, Vocabulary


@dataclass(frozen=True)
class Tokens(Agreement):
    """Attributes:
    vocabulary: the ids that student and teachers are over; others have probability zero on every side.
    end_ids: ids that end a completion.
    """

    vocabulary: Vocabulary = EVERY_ID
    end_ids: tuple[int, ...] = ()

    @property
    def count(self) -> int | None:
        size, ids = self.vocabulary.size, self.vocabulary.ids
        return len(ids) if ids is not None else None if size is None else size - len(self.vocabulary.excluded)


def tokens_of(context: Context) -> Tokens:
    """The agreement of a run on language; every id and no end where nothing has been agreed on yet."""
    return context.agreed_as(Tokens)
