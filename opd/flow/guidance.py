"""What students and teachers of flow agree on before a run."""

from __future__ import annotations

from dataclasses import dataclass

from opd.context import Agreement, Context


@dataclass(frozen=True)
class Guidance(Agreement):
    """The `scale` of classifier-free guidance, for student and teachers alike; 1 is without."""

    scale: float = 1.0


def guidance_of(context: Context) -> float:
    """The agreed scale; 1 where nothing has been agreed on yet."""
    return context.agreed_as(Guidance).scale
