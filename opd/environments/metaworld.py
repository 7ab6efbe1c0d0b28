"""Meta-World: fifty tasks of an arm on a table, each with a scripted expert."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from opd.acting.seeing import NO_PICTURE, Body, Plan, Seen
from opd.environments.base import Start, Turn
from opd.environments.control import Control, ControlWorld
from opd.environments.gymnasium import made, scaled
from opd.errors import ModelError

PROPRIO, STATE = 4, 39
"""Numbers of the hand (place and opening), which come first, and of a whole observation."""


class MetaWorld(Control):
    """Tasks of Meta-World by name, `reach-v3` and so on. The state is its observation of 39 numbers, of which the
    student's body is the first four; pictures are rendered by software where there is no display, which is slow.

    Success is `info["success"]`. The package's scripted experts plan ahead in the simulator, whose state is put back.
    """

    kind: Literal["metaworld"] = "metaworld"
    expert: ClassVar[bool] = True
    repeats: ClassVar[bool | None] = True
    only: list[str] = Field(["reach-v3", "push-v3", "drawer-open-v3"], min_length=1, description="Tasks by name")
    pixels: int = Field(0, ge=0, le=512, description="Side of the picture; 0 for none")
    camera: str = Field("corner2", description="Whose picture")
    unsure: float = Field(0.1, gt=0.0, le=1.0, description="Standard deviation of the expert's actions")
    limit: int = Field(150, ge=1, le=500, description="Most environment steps of an episode")

    @field_validator("only")
    @classmethod
    def _with_a_version(cls, value: list[str]) -> list[str]:
        for name in value:
            if "-v" not in name:
                raise ValueError(f"{name!r} names no task; names end with their version: {name}-v3")
        return value

    def tasks(self) -> Mapping[str, str]:
        return {name: name.rsplit("-v", 1)[0].replace("-", " ") for name in self.only}

    def body(self) -> Body:
        return Body((-1.0,) * 4, (1.0,) * 4, int(self.pixels > 0), self.pixels, PROPRIO, STATE)

    def build(self) -> MetaWorldArm:
        return MetaWorldArm(self)


class MetaWorldArm(ControlWorld):
    """The built environment; each task's own is made when it is first played."""

    def __init__(self, settings: MetaWorld):
        try:
            import metaworld  # noqa: F401  # it registers its ids
            from metaworld.policies import ENV_POLICY_MAP
        except ImportError:
            raise ModelError("environment 'metaworld' needs its package: pip install metaworld") from None
        unknown = [name for name in settings.only if name not in ENV_POLICY_MAP]
        if unknown:
            raise ModelError(
                f"Meta-World has no task {unknown[0]!r}; it has {', '.join(sorted(ENV_POLICY_MAP)[:6])}, ..."
            )
        self.settings, self.experts = settings, ENV_POLICY_MAP
        self.envs: dict[str, Any] = {}
        self.task, self.steps = settings.only[0], 0

    @property
    def _env(self) -> Any:
        if self.task not in self.envs:
            size = self.settings.pixels
            shown = {"camera_name": self.settings.camera, "width": size, "height": size} if size else {}
            env: Any = made("Meta-World/MT1", {"env_name": self.task, "seed": 0, **shown}, size > 0)
            # The package draws one of fifty initial states by a generator that nobody can seed; here each is drawn
            # anew, by the seed of the episode.
            env.get_wrapper_attr("toggle_sample_tasks_on_reset")(False)
            env.unwrapped.set_task(env.get_wrapper_attr("tasks")[0])
            env.unwrapped._freeze_rand_vec, env.unwrapped.seeded_rand_vec = False, True
            self.envs[self.task] = env
        return self.envs[self.task]

    def reset(self, start: Start) -> Turn[Seen]:
        self.task, self.steps = start.task, 0
        self._env.unwrapped.np_random = np.random.default_rng(start.seed)
        self.observation, _ = self._env.reset()
        self.expert = self.experts[self.task]()
        return Turn(self._seen())

    def step(self, action: np.ndarray) -> Turn[Seen]:
        self.observation, _, _, _, info = self._env.step(np.asarray(action, np.float32).clip(-1, 1))
        self.steps += 1
        success = bool(info["success"])
        return Turn(self._seen(), float(success), success, not success and self.steps >= self.settings.limit)

    def plan(self, horizon: int) -> Plan:
        import mujoco

        arm = self._env.unwrapped
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(arm.model, kind))
        mujoco.mj_getState(arm.model, arm.data, state, kind)
        # What it remembers in Python beside the simulator.
        kept = {name: copy.copy(value) for name, value in vars(arm).items() if isinstance(value, KEPT)}
        observation, found = self.observation, []
        try:
            for _ in range(horizon):
                action = np.asarray(self.expert.get_action(observation), np.float32).clip(-1, 1)
                found.append(action)
                observation, *_ = arm.step(action)
        finally:
            vars(arm).update(kept)
            mujoco.mj_setState(arm.model, arm.data, state, kind)
            mujoco.mj_forward(arm.model, arm.data)
        mean = np.stack(found)
        return Plan(mean, np.full_like(mean, self.settings.unsure))

    def frame(self) -> np.ndarray | None:
        return self._picture() if self.settings.pixels else None

    def close(self) -> None:
        for env in self.envs.values():
            env.close()

    def _seen(self) -> Seen:
        numbers = np.asarray(self.observation, np.float32)
        images = self._picture()[None] if self.settings.pixels else NO_PICTURE
        return Seen(images, numbers[:PROPRIO], numbers)

    def _picture(self) -> np.ndarray:
        # Its cameras hang head down.
        return scaled(np.ascontiguousarray(self._env.render()[::-1]), self.settings.pixels)


KEPT = (bool, int, float, np.ndarray, np.number)
"""Kinds of values that an arm remembers of an episode."""
