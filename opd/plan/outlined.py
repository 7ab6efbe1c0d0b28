"""What plans of students that write no text have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd.planning import Shape, bytes_text, count_text
from opd.recipe import Recipe

Rows = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class OutlinedPlan(ABC):
    """The plan of a recipe: `models` by role, and `memory` in bytes by part."""

    recipe: str
    models: dict[str, Shape]
    steps: int
    memory: dict[str, int]
    notes: tuple[str, ...]

    @abstractmethod
    def of_step(self) -> dict[str, Any]:
        """What a step holds, as data."""

    @abstractmethod
    def rows_of_step(self) -> Rows:
        """The same for people."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "steps": self.steps,
            "models": {
                role: {"name": s.name, "parameters": s.parameters, "trainable": s.trainable}
                for role, s in self.models.items()
            },
            **self.of_step(),
            "memory_bytes": self.memory,
            "peak_memory_bytes": sum(self.memory.values()),
            "notes": list(self.notes),
        }

    def sections(self) -> Iterator[tuple[str, Rows]]:
        yield (
            "models",
            [
                (
                    f"{role}: {shape.name}",
                    f"{count_text(shape.parameters)} parameters, {count_text(shape.trainable)} trained",
                )
                for role, shape in self.models.items()
            ],
        )
        yield ("a step, at most", self.rows_of_step())
        rows = [(part, bytes_text(value)) for part, value in self.memory.items()]
        yield ("memory at the peak of a step", [*rows, ("sum", bytes_text(sum(self.memory.values())))])


def trained_memory(own: Shape, moving: int, recipe: Recipe) -> dict[str, int]:
    """Bytes of the student's weights, and of gradients and the optimiser's state of the `moving` bytes of them."""
    averaged = getattr(recipe.update, "average", None) is not None
    return {
        "student weights": own.weight_bytes,
        "gradients": moving,
        "optimiser state": (3 if averaged else 2) * moving,
    }
