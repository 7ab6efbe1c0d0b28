"""Any environment of gymnasium, by its id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from opd.acting.seeing import NO_PICTURE, Body, Seen
from opd.environments.base import Start, Turn
from opd.environments.control import Control, ControlWorld
from opd.errors import ModelError, first_line

if TYPE_CHECKING:
    from gymnasium import Env


class GymnasiumEnvironment(Control):
    """One task of a `gymnasium` environment. Numbers of its observations, flat and by the names of their parts, are the
    state; pictures are those of the observation or of `render()`.

    Success is `info[success]` where that is there, and without `success` that the episode is terminated.
    """

    kind: Literal["gymnasium"] = "gymnasium"
    id: str = Field(description="As gymnasium.make takes it: Reacher-v5, or PACKAGE:ID to import a package first")
    instruction: str = Field("solve the task", description="What the policy reads")
    options: dict[str, Any] = Field({}, description="Further arguments of gymnasium.make")
    pixels: int = Field(0, ge=0, le=1024, description="Side of the picture, scaled; 0 for none")
    picture: Literal["observation", "render"] = Field("render", description="Where the picture is from")
    proprio: int = Field(0, ge=0, description="How many of the state's first numbers the student sees")
    success: str | None = Field(None, description="Key of `info` that is true in a success; default: terminated")

    def tasks(self) -> Mapping[str, str]:
        return {self.id: self.instruction}

    def body(self) -> Body:
        world = self.build()
        try:
            return world.body()
        finally:
            world.close()

    def build(self) -> GymnasiumWorld:
        return GymnasiumWorld(self, made(self.id, self.options, self.pixels > 0 and self.picture == "render"))


def made(name: str, options: Mapping[str, Any], rendered: bool) -> Env[object, object]:
    """An environment of gymnasium.

    Raises:
        ModelError: it is not installed, or makes no such environment.
    """
    try:
        import gymnasium
    except ImportError:
        raise ModelError("environments of gymnasium need it: pip install 'opd[gymnasium]'") from None
    try:
        given: dict[str, Any] = {
            "disable_env_checker": True,
            **options,
            **({"render_mode": "rgb_array"} if rendered else {}),
        }
        return gymnasium.make(name, **given)
    except Exception as error:  # whatever an environment raises when it is made
        raise ModelError(
            f"environment {name!r} cannot be made ({type(error).__name__}: {first_line(error)}); give an id of "
            "gymnasium, as PACKAGE:ID where a package registers it, and what it needs"
        ) from None


class GymnasiumWorld(ControlWorld):
    """A built environment of gymnasium, with actions in a box or, as a number that is rounded, one of several."""

    def __init__(self, settings: GymnasiumEnvironment, env: Env[object, object]):
        self.settings, self.steps = settings, 0
        self.env: Any = env
        space: Any = env.action_space
        self.discrete = type(space).__name__ == "Discrete"
        if not self.discrete and type(space).__name__ != "Box":
            raise ModelError(
                f"environment {settings.id!r} is moved by a {type(space).__name__}; a Box of numbers or a Discrete "
                "choice is needed"
            )
        self.space = space

    def body(self) -> Body:
        seen = self._seen(self.env.reset(seed=0)[0])
        if self.discrete:
            low, high = (float(self.space.start),), (float(self.space.start + self.space.n - 1),)
        else:
            low, high = (tuple(np.asarray(each, float).ravel().tolist()) for each in (self.space.low, self.space.high))
        if not np.isfinite([*low, *high]).all():
            raise ModelError(
                f"environment {self.settings.id!r} has actions without bounds, which cannot be cut into tokens; wrap it"
            )
        return Body(low, high, len(seen.images), self.settings.pixels, len(seen.proprio), len(seen.state))

    def reset(self, start: Start) -> Turn[Seen]:
        self.steps = 0
        # One seed makes the initial state and what follows: episodes of a group share both.
        observation, _ = self.env.reset(seed=start.seed)
        return Turn(self._seen(observation))

    def step(self, action: np.ndarray) -> Turn[Seen]:
        if self.discrete:
            given: Any = int(np.rint(action[0]).clip(self.space.start, self.space.start + self.space.n - 1))
        else:
            given = np.asarray(action, self.space.dtype).reshape(self.space.shape).clip(self.space.low, self.space.high)
        observation, _, terminated, truncated, info = self.env.step(given)
        self.steps += 1
        name = self.settings.success
        success = bool(terminated) if name is None else bool(info.get(name, False))
        done = bool(terminated) or success
        cut = not done and (bool(truncated) or self.steps >= self.settings.limit)
        return Turn(self._seen(observation), float(success), done, cut)

    def frame(self) -> np.ndarray | None:
        return self.env.render() if self.env.render_mode == "rgb_array" else None

    def close(self) -> None:
        self.env.close()

    def _seen(self, observation: Any) -> Seen:
        settings = self.settings
        numbers, pictures = parts(observation)
        images = NO_PICTURE
        if settings.pixels:
            found = pictures if settings.picture == "observation" else [self.env.render()]
            if not found:
                raise ModelError(f"environment {settings.id!r} has no picture in its observations; set picture: render")
            images = np.stack([scaled(picture, settings.pixels) for picture in found])
        state = np.concatenate([np.zeros(0, np.float32), *(np.asarray(n, np.float32).ravel() for n in numbers)])
        return Seen(images, state[: settings.proprio], state)


def parts(observation: object) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`(numbers, pictures)` of an observation: of a mapping those of its parts, by name."""
    if isinstance(observation, Mapping):
        found = [parts(observation[key]) for key in sorted(observation)]
        return [n for numbers, _ in found for n in numbers], [p for _, pictures in found for p in pictures]
    array = np.asarray(observation)
    picture = array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3
    return ([], [array]) if picture else ([array], [])


def scaled(picture: np.ndarray, side: int) -> np.ndarray:
    """uint8 `[side, side, 3]`."""
    if picture.shape[:2] == (side, side):
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX))
