"""What was made of prompts, kept up to a number of bytes: the latest stay."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")

ROOM = 2**28
"""Bytes."""


class Memory(Generic[T]):
    """Values by an object itself, whatever equals it, and a name. A copy of a model begins with none."""

    def __init__(self, room: int = ROOM):
        self.room, self.held = room, 0
        self._kept: OrderedDict[tuple[int, str | None], tuple[object, T, int]] = OrderedDict()

    def get(self, of: object, name: str | None) -> T | None:
        found = self._kept.get((id(of), name))
        if found is None:
            return None
        self._kept.move_to_end((id(of), name))
        return found[1]

    def keep(self, of: object, name: str | None, value: T, size: int) -> None:
        """Keep `value`, of `size` bytes; what was asked for longest ago makes room for it."""
        old = self._kept.pop((id(of), name), None)
        self.held += size - (0 if old is None else old[2])
        # The object is held, so that no other one gets its number.
        self._kept[id(of), name] = (of, value, size)
        while self.held > self.room and len(self._kept) > 1:
            _, (_, _, gone) = self._kept.popitem(last=False)
            self.held -= gone

    def __deepcopy__(self, memo: dict[int, object]) -> Memory[T]:
        return Memory(self.room)

    def __getstate__(self) -> dict[str, int]:
        return {"room": self.room}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["room"])  # type: ignore[misc]
