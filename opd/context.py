"""What the parts of a run are built with: the few facts that several axes must agree on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from opd.errors import IncompatibleError


@dataclass(frozen=True)
class Agreement:
    """What student and teachers of one modality settle among themselves (`Student.agree`). Each modality has a
    subclass, whose fields nobody outside of it knows."""

    @property
    def count(self) -> int | None:
        """How many ids the run's distributions give probability to; None where that is open, or actions are no ids."""
        return None


A = TypeVar("A", bound=Agreement)


@dataclass(frozen=True)
class Context:
    """Facts of a run, each decided in one place.

    Attributes:
        device: where the student lives.
        temperature: the recipe's one temperature, for sampling, student and teacher alike.
        seed: the recipe's seed.
        agreed: what student and teachers agreed on.
        steps: optimiser steps of the run.
    """

    device: torch.device
    temperature: float = 1.0
    seed: int = 0
    agreed: Agreement = Agreement()
    steps: int = 1

    def with_(self, **changes: Any) -> Context:
        return replace(self, **changes)

    def agreed_as(self, kind: type[A]) -> A:
        """The agreement of a modality; its defaults where nothing has been agreed on yet.

        Raises:
            IncompatibleError: another modality's was made.
        """
        if isinstance(self.agreed, kind):
            return self.agreed
        if type(self.agreed) is not Agreement:
            raise IncompatibleError(
                f"this run's models agreed on {type(self.agreed).__name__}, and one of its parts asks for "
                f"{kind.__name__}: a choice for another kind of model is among them"
            )
        return kind()
