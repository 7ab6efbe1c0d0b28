"""Environments: episodes that repeat themselves, experts, and simulators that crash or hang."""

from __future__ import annotations

import os
import time
from typing import ClassVar, Literal

import numpy as np
import pytest

from benchmarks import simulators
from opd.acting.seeing import NO_PICTURE, Body, Plan, Seen
from opd.environments import Start, Turn
from opd.environments.arena import Arena
from opd.environments.control import Control, ControlOrder, ControlWorld
from opd.environments.gymnasium import GymnasiumEnvironment
from opd.environments.pixel_pick import SUITES, PixelPick
from opd.environments.rows import repeats
from opd.errors import ModelError


def played(world, task, seed, draw=0):
    """An episode of the expert: its states and outcome."""
    chunk = world.begin(Start(task, seed, draw), 4)
    states = [chunk.turn.observation]
    while not chunk.turn.over:
        chunk = world.play(chunk.plan.mean, 4)
        states.append(chunk.turn.observation)
    return states, chunk.turn.outcome


@pytest.mark.parametrize("suite", SUITES)
def test_the_expert_of_the_pixel_task_is_competent(suite):
    settings = PixelPick(suite=suite, pixels=16)
    assert len(settings.tasks()) == 10
    world = settings.build()
    outcomes = [played(world, task, seed)[1] for seed, task in enumerate(settings.tasks())]
    assert np.mean(outcomes) == 1


def test_an_episode_is_its_start_and_its_actions():
    worlds = [PixelPick(pixels=16).build() for _ in range(2)]
    played(worlds[1], "blue_ball", 3)
    (a, _), (b, _) = (played(world, "red_block", 5, 1) for world in worlds)
    assert all(
        np.array_equal(x.images, y.images) and np.array_equal(x.state, y.state) for x, y in zip(a, b, strict=True)
    )
    (other, _) = played(worlds[0], "red_block", 5, 2)
    assert np.array_equal(other[0].images, a[0].images), "the initial state is the seed's"
    assert not np.array_equal(other[1].state, a[1].state), "the actuators' noise is each episode's own"


def test_only_the_named_thing_on_the_named_ring_is_success():
    world = PixelPick(suite="goal", noise=0.0).build()
    world.reset(Start("block_red", 0))
    floor = world.floor
    floor.gripper = floor.things[0].copy()
    floor.rings[1] = [0.2, 0.2]
    floor.rings[0] = [0.8, 0.8]
    for place, success in (((0.2, 0.2), 0.0), ((0.8, 0.8), 1.0)):
        world.step(np.array([0, 0, 1.0]))
        floor.gripper = floor.things[0] = np.array(place)
        turn = world.step(np.array([0, 0, -1.0]))
        assert turn.outcome == success
    assert turn.done
    assert world.step(np.zeros(3)).done


def test_a_step_is_cut_at_the_limit_and_nothing_is_played_behind_the_end():
    world = PixelPick(limit=6, pixels=16).build()
    world.begin(Start("red_block", 0), 0)
    first, second = (world.play(np.zeros((4, 3)), 0) for _ in range(2))
    assert (first.played, first.turn.over) == (4, False)
    assert (second.played, second.turn.cut, second.turn.done) == (2, True, False)


class Faulty(Control):
    """Fails as the action says: above 2 it raises, above 4 the process dies, above 6 it hangs."""

    kind: Literal["faulty"] = "faulty"
    expert: ClassVar[bool] = True

    def tasks(self):
        return {"task": "do it"}

    def body(self):
        return Body((-9.0,), (9.0,), state=1)

    def build(self):
        return FaultyWorld()


class FaultyWorld(ControlWorld):
    def reset(self, start):
        self.total = float(start.seed)
        return self._turn()

    def step(self, action):
        value = float(action[0])
        if value > 6:
            time.sleep(60)
        if value > 4:
            os._exit(3)
        if value > 2:
            raise ValueError("joint limits are violated")
        self.total += value
        return self._turn()

    def plan(self, horizon):
        return Plan(np.zeros((horizon, 1), np.float32), np.ones((horizon, 1), np.float32))

    def _turn(self):
        numbers = np.array([self.total], np.float32)
        return Turn(Seen(NO_PICTURE, numbers, numbers))


def acted(arena, values):
    environment = Faulty()
    orders = [ControlOrder(i, environment, np.array([[value]]), 0) for i, value in enumerate(values)]
    return [None if c is None else float(c.turn.observation.state[0]) for c in arena.play(orders)]


def begun(arena, count):
    return arena.play([ControlOrder(i, Faulty(), Start("task", 10 * i), 0) for i in range(count)])


def test_a_world_that_raises_costs_its_episode_alone():
    arena = Arena()
    begun(arena, 3)
    assert acted(arena, [1, 3, 1]) == [1, None, 21]
    assert dict(arena.lost) == {"faulty: ValueError: joint limits are violated": 1}
    # Its place is usable again.
    assert begun(arena, 3)[1] is not None
    assert arena.read()["restarts"] == 1
    assert arena.read()["restarts"] == 0
    arena.close()


def test_processes_that_die_or_hang_begin_anew_and_the_others_go_on_where_they_were():
    arena = Arena(processes=1, patience=30.0)
    try:
        begun(arena, 3)
        assert acted(arena, [1, 1, 1]) == [1, 11, 21]
        assert acted(arena, [1, 5, 1]) == [2, None, 22], "places 0 and 2 were played again"
        arena.play([ControlOrder(1, Faulty(), Start("task", 50), 0)])
        assert acted(arena, [7, 2, 1]) == [None, 52, 23]
        assert dict(arena.lost) == {"faulty: crash": 1, "faulty: hang": 1}
    finally:
        arena.close()


def test_any_environment_of_gymnasium_by_its_id():
    pytest.importorskip("gymnasium")
    settings = GymnasiumEnvironment(id="MountainCarContinuous-v0", proprio=1, limit=3, instruction="reach the flag")
    assert settings.body() == Body((-1.0,), (1.0,), proprio=1, state=2)
    world = settings.build()
    first, again = (world.reset(Start(settings.id, 4, draw)).observation for draw in (0, 1))
    assert np.array_equal(first.state, again.state)
    chunk = world.play(np.ones((5, 1)), 0)
    assert (chunk.played, chunk.turn.cut, chunk.turn.outcome) == (3, True, 0.0)
    assert GymnasiumEnvironment(id="CartPole-v1").body() == Body((0.0,), (1.0,), state=4)


def test_an_environment_that_does_not_repeat_itself_is_found():
    class Drifting(Faulty):
        kind: Literal["drifting"] = "drifting"

        def build(self):
            world, state = FaultyWorld(), next(drift)
            plain = world.reset
            world.reset = lambda start: plain(Start(start.task, next(drift))) if state >= 0 else plain(start)
            return world

    drift = iter(range(100))
    assert not repeats(Drifting())
    assert repeats(Faulty())
    assert repeats(PixelPick())
    # What is defined here is a choice nowhere else.
    Drifting.__annotations__.pop("kind")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"id": "NoSuch-v0"}, "'NoSuch-v0' cannot be made"),
        ({"id": "CartPole-v1", "pixels": 8, "picture": "observation"}, "no picture in its observations"),
    ],
)
def test_what_gymnasium_cannot_make_is_told_in_a_line(settings, told):
    pytest.importorskip("gymnasium")
    with pytest.raises(ModelError, match=told):
        GymnasiumEnvironment(**settings).body()


@pytest.mark.parametrize("processes", [0, 1])
def test_the_benchmark_of_simulators_counts_what_was_played(processes):
    assert simulators.steps_a_second(PixelPick(), processes, 2) > 0
