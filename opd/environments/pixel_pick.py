"""A small world of pixels: pick up the thing that the instruction names and put it on the ring that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from opd.acting.seeing import Body, Plan, Seen
from opd.environments.base import Start, Turn
from opd.environments.control import Control, ControlWorld
from opd.errors import nearest

Suite = Literal["object", "goal", "spatial", "long"]
SUITES: tuple[Suite, ...] = get_args(Suite)

COLOURS = {
    "red": (220, 50, 47),
    "green": (60, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (230, 200, 40),
    "purple": (160, 70, 190),
}
GREY = (150, 150, 150)
SHAPES = ("block", "ball")
SIDES = ("left", "right", "upper", "lower", "nearer")
REACH, SPEED, NEAR = 0.06, 0.08, 0.07
"""How near the gripper must be to take a thing, how far it moves in a step at full speed, and how near to the ring's
middle a thing must lie; the floor is 1 wide."""
OPEN, CLOSED = -1.0, 1.0


@dataclass(frozen=True)
class Task:
    """One task: what is asked, and which things and rings lie there. `goals` are pairs of a thing's and a ring's place
    in these lists, in the order in which they are to be done; for a relation the thing is found by where it lies."""

    instruction: str
    things: tuple[tuple[str, str], ...]
    rings: tuple[str, ...]
    goals: tuple[tuple[int, int], ...]
    side: str | None = None


def tasks_of(suite: Suite) -> dict[str, Task]:
    """Ten tasks: ten things to one ring, one thing to ten pairs of rings, one of two alike by where it lies, and two
    things one after the other."""
    colours = list(COLOURS)
    found: dict[str, Task] = {}
    if suite == "object":
        kinds = [(colour, shape) for colour in colours for shape in SHAPES]
        for i, (colour, shape) in enumerate(kinds):
            others = (kinds[(i + 1) % 10], kinds[(i + 4) % 10])
            found[f"{colour}_{shape}"] = Task(
                f"put the {colour} {shape} on the grey ring", ((colour, shape), *others), ("grey",), ((0, 0),)
            )
    elif suite == "goal":
        for i, colour in enumerate(colours):
            for shape in SHAPES:
                rings = (colour, colours[(i + 1) % 5], colours[(i + 3) % 5])
                # The thing is grey, so that no ring's colour points at it.
                found[f"{shape}_{colour}"] = Task(
                    f"put the grey {shape} on the {colour} ring", (("grey", shape),), rings, ((0, 0),)
                )
    elif suite == "spatial":
        for side in SIDES:
            for shape in SHAPES:
                found[f"{side}_{shape}"] = Task(
                    f"put the {side} {shape} on the grey ring", (("red", shape),) * 2, ("grey",), ((0, 0),), side
                )
    else:
        pairs = [(a, b) for i, a in enumerate(colours) for b in colours[i + 1 :]]
        for first, second in pairs:
            found[f"{first}_{second}"] = Task(
                f"put the {first} block and then the {second} block on the grey ring",
                ((first, "block"), (second, "block")),
                ("grey",),
                ((0, 0), (1, 0)),
            )
    return found


WORDS = sorted({w for suite in SUITES for task in tasks_of(suite).values() for w in task.instruction.split()})
"""Every word of every instruction."""


class PixelPick(Control):
    """Pick and place in pictures of `pixels`: actions are two speeds and the gripper (open below 0, closed above).

    Four suites of ten tasks. Success is the named thing let go on the named ring, in `long` both things in order. It
    has an expert, and no episode depends on the one before.
    """

    kind: Literal["pixel_pick"] = "pixel_pick"
    expert: ClassVar[bool] = True
    repeats: ClassVar[bool | None] = True
    suite: Suite = Field("object", description="Which ten tasks")
    only: list[str] = Field([], description="Tasks of the suite by name; default all of them")
    pixels: int = Field(48, ge=16, le=256, description="Side of the picture")
    noise: float = Field(0.1, ge=0.0, le=1.0, description="Standard deviation of the speeds' noise, of full speed")
    unsure: float = Field(0.1, gt=0.0, le=1.0, description="Standard deviation of the expert's actions")
    tolerance: float = Field(
        1.0, ge=0.5, le=3.0, description="Times the distances at which a thing is taken and lies on its ring"
    )
    limit: int = Field(40, ge=1, description="Most environment steps of an episode; of the suite long, twice as many")

    @field_validator("only")
    @classmethod
    def _of_the_suite(cls, value: list[str], info: ValidationInfo) -> list[str]:
        known = tasks_of(info.data.get("suite", "object"))
        for name in value:
            if name not in known:
                raise ValueError(f"no task {name!r}{nearest(name, known)}; the suite has {', '.join(known)}")
        return value

    def tasks(self) -> Mapping[str, str]:
        return {name: task.instruction for name, task in self.chosen().items()}

    def chosen(self) -> dict[str, Task]:
        found = tasks_of(self.suite)
        return {name: found[name] for name in self.only or found}

    def body(self) -> Body:
        return Body((-1.0,) * 3, (1.0,) * 3, cameras=1, pixels=self.pixels, proprio=4, state=10)

    @property
    def longest(self) -> int:
        return self.limit * (2 if self.suite == "long" else 1)

    def build(self) -> PixelWorld:
        return PixelWorld(self)


@dataclass
class Floor:
    """What is where: float64 `[2]` and `[n, 2]` places in 0..1, y downwards."""

    gripper: np.ndarray
    closed: bool
    held: int
    things: np.ndarray
    rings: np.ndarray
    goals: tuple[tuple[int, int], ...]
    """Those that are not reached yet."""
    tolerance: float

    def copy(self) -> Floor:
        return replace(self, gripper=self.gripper.copy(), things=self.things.copy())

    def move(self, action: np.ndarray) -> None:
        """One step: the gripper moves and takes along what it holds, then it closes or opens."""
        self.gripper = (self.gripper + SPEED * action[:2]).clip(0, 1)
        if self.held >= 0:
            self.things[self.held] = self.gripper
        close = bool(action[2] > 0)
        if close and not self.closed:
            away = np.linalg.norm(self.things - self.gripper, axis=1)
            if away.min() < self.tolerance * REACH:
                self.held = int(away.argmin())
                self.things[self.held] = self.gripper
        elif not close and self.held >= 0:
            thing, ring = self.goals[0]
            if self.held == thing and np.linalg.norm(self.things[thing] - self.rings[ring]) < self.tolerance * NEAR:
                self.goals = self.goals[1:]
            self.held = -1
        self.closed = close

    def expert(self) -> np.ndarray:
        """The action that leads on, float64 `[3]`: to the thing, close, to the ring, open."""
        thing, ring = self.goals[0] if self.goals else (0, 0)
        right = self.held == thing
        if self.held >= 0 and not right:
            return np.array([0.0, 0.0, OPEN])
        way = (self.rings[ring] if right else self.things[thing]) - self.gripper
        speed = way / SPEED
        longest = np.abs(speed).max()
        there = longest < 0.35
        if longest > 1:
            speed = speed / longest
        if right:
            return np.array([*speed, OPEN if there else CLOSED])
        return np.array([*speed, CLOSED if there and not self.closed else OPEN])


class PixelWorld(ControlWorld):
    """The built environment."""

    def __init__(self, settings: PixelPick):
        self.settings, self.known = settings, settings.chosen()
        self.steps = 0

    def reset(self, start: Start) -> Turn[Seen]:
        self.task = self.known[start.task]
        rng = np.random.default_rng([start.seed, 1])
        self.noise = np.random.default_rng([start.seed, start.draw, 2])
        count = len(self.task.things) + len(self.task.rings)
        while True:
            places = rng.uniform(0.1, 0.9, (count + 1, 2))
            apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(count + 1)
            if apart.min() > 0.16:
                break
        things, rings = places[1 : 1 + len(self.task.things)], places[1 + len(self.task.things) :]
        goals = self.task.goals
        if self.task.side is not None:
            # The thing that is meant stands first, so that both are told apart by their place alone.
            keys = {
                "left": things[:, 0],
                "right": -things[:, 0],
                "upper": things[:, 1],
                "lower": -things[:, 1],
                "nearer": np.linalg.norm(things - rings[0], axis=1),
            }
            things = things[np.argsort(keys[self.task.side])]
        self.floor = Floor(places[0], False, -1, things.copy(), rings, goals, self.settings.tolerance)
        self.steps = 0
        return self._turn()

    def step(self, action: np.ndarray) -> Turn[Seen]:
        action = np.asarray(action, dtype=np.float64).clip(-1, 1)
        action[:2] += self.settings.noise * self.noise.standard_normal(2)
        self.floor.move(action)
        self.steps += 1
        return self._turn()

    def plan(self, horizon: int) -> Plan:
        floor, found = self.floor.copy(), []
        for _ in range(horizon):
            action = floor.expert() if floor.goals else np.array([0.0, 0.0, OPEN])
            found.append(action)
            floor.move(action)
        mean = np.array(found, dtype=np.float32)
        return Plan(mean, np.full_like(mean, self.settings.unsure))

    def frame(self) -> np.ndarray:
        return self._picture()

    def _turn(self) -> Turn[Seen]:
        floor = self.floor
        own = [*floor.gripper, float(floor.closed), float(floor.held >= 0)]
        thing, ring = floor.goals[0] if floor.goals else self.task.goals[-1]
        meant = [*floor.things[thing], *floor.rings[ring], float(floor.held == thing), float(len(floor.goals))]
        seen = Seen(
            self._picture()[None], np.array(own, np.float32) * 2 - 1, np.array([*own, *meant], np.float32) * 2 - 1
        )
        done = not floor.goals
        return Turn(seen, float(done), done, not done and self.steps >= self.settings.longest)

    def _picture(self) -> np.ndarray:
        """uint8 `[H, W, 3]`."""
        size = self.settings.pixels
        picture = np.full((size, size, 3), 25, np.uint8)
        unit = size / 48
        thing, ring, arm = (max(1, round(unit * n)) for n in (3, 5, 3))

        def box(place: np.ndarray, half: int) -> tuple[slice, slice]:
            x, y = (np.rint(place * (size - 1)).astype(int)).tolist()
            return slice(max(0, y - half), y + half + 1), slice(max(0, x - half), x + half + 1)

        for place, colour in zip(self.floor.rings, self.task.rings, strict=True):
            picture[box(place, ring)] = GREY if colour == "grey" else COLOURS[colour]
            picture[box(place, ring - max(1, round(unit * 1.5)))] = 25
        for place, (colour, shape) in zip(self.floor.things, self.task.things, strict=True):
            rgb = GREY if colour == "grey" else COLOURS[colour]
            if shape == "block":
                picture[box(place, thing)] = rgb
            else:
                # A ball is a cross: in so few pixels a disc is a block.
                y, x = box(place, thing)
                thin_y, thin_x = box(place, max(0, thing - 2))
                picture[y, thin_x] = rgb
                picture[thin_y, x] = rgb
        shade = (255, 255, 255) if self.floor.closed else (200, 255, 255)
        y, x = box(self.floor.gripper, arm)
        middle_y, middle_x = box(self.floor.gripper, 0)
        picture[y, middle_x] = shade
        picture[middle_y, x] = shade
        return picture
