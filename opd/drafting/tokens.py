"""What a drafter's run agrees on: the ids that are proposed, and those that a text may hold."""

from __future__ import annotations

from dataclasses import dataclass

from opd.context import Context
from opd.distributions import EVERY_ID, Vocabulary
from opd.language.tokens import Tokens


@dataclass(frozen=True)
class DraftTokens(Tokens):
    """Attributes:
    vocabulary: the ids that the drafter may propose; over them it is compared with its target.
    written: the ids that the target writes and verifies with.
    """

    written: Vocabulary = EVERY_ID


def draft_tokens(context: Context) -> DraftTokens:
    """The agreement of a run that trains a drafter."""
    return context.agreed_as(DraftTokens)
