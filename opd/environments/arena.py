"""Worlds side by side, in this process or in others of their own that may crash or hang."""

from __future__ import annotations

import multiprocessing
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Generic, Protocol, TypeVar

from opd.choice import kind_of
from opd.environments.base import Environment, World
from opd.errors import OpdError, RunError, first_line

STARTING = 120.0
"""Seconds that a process may take to begin, before `patience` counts."""


class Ending(Protocol):
    """Of what an environment said, whether it was the last."""

    @property
    def over(self) -> bool: ...


class Answer(Protocol):
    """What came of an order, as far as it is counted."""

    @property
    def turn(self) -> Ending:
        """What the environment said last."""

    @property
    def played(self) -> int:
        """Environment steps."""


R = TypeVar("R", bound=Answer)


class Order(ABC, Generic[R]):
    """What one place is to do: begin an episode, or go on with it. It can be pickled, and done again it comes to the
    same where the environment repeats itself.

    Attributes:
        place: which of the worlds that stand side by side.
    """

    place: int
    environment: Environment

    @property
    @abstractmethod
    def begins(self) -> bool:
        """Whether an episode begins here, and what was done in this place before does not matter."""

    @abstractmethod
    def carry_out(self, world: World) -> R:
        """Do it in a world of the order's environment."""


class Host:
    """Worlds by place; each is kept until its place wants another environment, or until it fails."""

    def __init__(self) -> None:
        self.worlds: dict[int, tuple[Environment, World]] = {}

    def do(self, order: Order[R]) -> R | Exception:
        """What came of it. An `OpdError` is a mistake that a person can mend; any other error is the world's own, which
        is not played in again."""
        try:
            return order.carry_out(self._world(order) if order.begins else self.worlds[order.place][1])
        except Exception as error:
            self._drop(order.place)
            if isinstance(error, OpdError):
                return error
            return RuntimeError(f"{type(error).__name__}: {first_line(error)}")

    def _world(self, order: Order[R]) -> World:
        held = self.worlds.get(order.place)
        if held is None or held[0] != order.environment:
            self._drop(order.place)
            held = (order.environment, order.environment.build())
            self.worlds[order.place] = held
        return held[1]

    def _drop(self, place: int) -> None:
        held = self.worlds.pop(place, None)
        if held is not None:
            with suppress(Exception):
                held[1].close()

    def close(self) -> None:
        for place in list(self.worlds):
            self._drop(place)


def serve(connection: Connection) -> None:
    """A process of worlds: orders come one by one, and each is answered; None ends it."""
    host = Host()
    connection.send("ready")
    with suppress(EOFError, KeyboardInterrupt):
        while (order := connection.recv()) is not None:
            connection.send(host.do(order))
    host.close()


class Worker:
    """One such process, seen from here. What it says is pickled by a child of ours and read by us alone."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        if not self._answered(STARTING):
            self.kill()
            raise RunError(
                "a simulator's process does not start; where opd runs from a script, the script's own code must stand "
                "under `if __name__ == '__main__':`, or set rollout.processes to 0"
            )

    def _answered(self, seconds: float) -> bool:
        """Whether an answer is there, which `ready` is too."""
        try:
            return self.connection.poll(seconds) and self.connection.recv() == "ready"
        except (EOFError, OSError):
            return False

    def send(self, order: Order) -> None:
        with suppress(OSError):
            self.connection.send(order)

    def receive(self, patience: float) -> Answer | Exception | str:
        """The answer to the oldest order, or in a word why there will be none."""
        try:
            if self.connection.poll(patience):
                return self.connection.recv()
        except (EOFError, OSError):
            return "crash"
        return "hang"

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.connection.close()

    def close(self) -> None:
        with suppress(OSError):
            self.connection.send(None)
        self.process.join(2)
        if self.process.is_alive():
            self.kill()


@dataclass
class Arena(Generic[R]):
    """Plays in many worlds at once.

    A world that raises, or whose process dies or says nothing for `patience` seconds, costs the episode that it was in:
    its process begins anew, and the other episodes of that process are played again up to where they were, from their
    starts and actions. An episode that is over before anything was done in it has no state to learn on and counts as
    lost too.

    Attributes:
        processes: how many play; 0 plays in this one, where nothing can be done about a world that hangs.
        patience: seconds that an order may take.
        lost: how often an episode was lost, by environment and reason.
        restarts, steps, seconds: processes or worlds that were made again, environment steps, and seconds in `play`,
            since they were last read.
    """

    processes: int = 0
    patience: float = 60.0
    lost: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._here = Host()
        self._workers: list[Worker] = []
        self._history: dict[int, list[Order[R]]] = {}

    def play(self, orders: Sequence[Order[R]]) -> list[R | None]:
        """What came of each order, places being different; None of one whose episode is lost.

        Raises:
            OpdError: a mistake in the environment's settings.
        """
        began = time.perf_counter()
        for order in orders:
            past = [] if order.begins else self._history[order.place]
            self._history[order.place] = [*past, order]
        found: dict[int, R | None]
        if self.processes:
            self._workers += [Worker() for _ in range(self.processes - len(self._workers))]
            shares = [[o for o in orders if o.place % self.processes == i] for i in range(self.processes)]
            # All have work before the first is waited for.
            for worker, share in zip(self._workers, shares, strict=True):
                for order in share:
                    worker.send(order)
            found = {}
            for i, share in enumerate(shares):
                found |= self._gathered(i, share)
        else:
            found = {order.place: self._taken(order, self._here.do(order)) for order in orders}
        self.seconds += time.perf_counter() - began
        self.steps += sum(answer.played for answer in found.values() if answer is not None)
        return [found[order.place] for order in orders]

    def _gathered(self, index: int, orders: Sequence[Order[R]]) -> dict[int, R | None]:
        """Answers of one process; where it fails, those of its successor."""
        found: dict[int, R | None] = {}
        for order in orders:
            answer = self._workers[index].receive(self.patience)
            if isinstance(answer, str):
                self._taken(order, answer)
                found[order.place] = None
                self._workers[index].kill()
                self._workers[index] = Worker()
                others = [o for o in orders if o is not order and found.get(o.place, ...) is not None]
                return found | {o.place: self._again(index, o) for o in others}
            found[order.place] = self._taken(order, answer)
        return found

    def _again(self, index: int, order: Order[R]) -> R | None:
        """The answer to an order of an innocent place, after all that was done there before."""
        answer: Answer | Exception | str = "crash"
        for past in self._history[order.place]:
            self._workers[index].send(past)
            answer = self._workers[index].receive(self.patience)
            if isinstance(answer, str):
                self._workers[index].kill()
                self._workers[index] = Worker()
            if isinstance(answer, Exception | str):
                break
        return self._taken(order, answer)

    def _taken(self, order: Order[R], answer: Answer | Exception | str) -> R | None:
        if isinstance(answer, OpdError):
            raise answer
        if not isinstance(answer, Exception | str):
            if order.begins and answer.turn.over:
                self.lost[f"{kind_of(order.environment)}: an episode is over before anything was done in it"] += 1
                return None
            return answer  # type: ignore[return-value]  # an order's own answer, though it came through a pipe
        self.lost[f"{kind_of(order.environment)}: {answer}"] += 1
        self.restarts += 1
        return None

    def read(self) -> Mapping[str, float]:
        """Counts since they were last read, which begin anew."""
        found = {"restarts": float(self.restarts), "steps": float(self.steps), "seconds": self.seconds}
        self.restarts, self.steps, self.seconds = 0, 0, 0.0
        return found

    def close(self) -> None:
        self._here.close()
        for worker in self._workers:
            worker.close()
        self._workers = []
