"""What student and teachers that act agree on before a run."""

from __future__ import annotations

from dataclasses import dataclass

from opd.context import Agreement, Context
from opd.distributions import EVERY_ID, Vocabulary


@dataclass(frozen=True)
class Actions(Agreement):
    """The slice of ids that are actions: what the student draws, and what every distribution of the run is over."""

    vocabulary: Vocabulary = EVERY_ID

    @property
    def count(self) -> int | None:
        return None if self.vocabulary.ids is None else len(self.vocabulary.ids)


def actions_of(context: Context) -> Actions:
    """The agreement of a run of policies that act."""
    return context.agreed_as(Actions)
