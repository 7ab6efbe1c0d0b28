"""A small world and policies for it, and the recipe that the tests of acting share."""

from __future__ import annotations

from opd.acting.creation import create_policy
from opd.environments.pixel_pick import PixelPick
from opd.recipe import parse_recipe

WORLD = PixelPick(suite="object", only=["red_block", "blue_ball"], pixels=24)
SIZES = {"width": 32, "layers": 2, "heads": 2, "bins": 16, "patch": 6}


def policy(folder, world=WORLD, **options) -> str:
    """The folder of a blank policy for a world."""
    words = list(world.tasks().values())
    return str(create_policy(folder, world.body(), words, key="pixels", **SIZES | options))


def episodes(world=WORLD, per_task=6, seed=0, **own):
    return {"kind": "episodes", "environment": world.model_dump(mode="json"), "per_task": per_task, "seed": seed, **own}


def recipe_of(student, output, *, world=WORLD, **changes):
    """Two small steps of a policy in a world, without a teacher unless one is given."""
    base = {
        "steps": 2,
        "output": str(output),
        "student": {"kind": "action_tokens", "model": student},
        "prompts": episodes(world),
        "rollout": {"kind": "simulator", "decisions": 4},
        "update": {"learning_rate": 1e-3},
        "batch": {"prompts": 3, "group": 2, "micro": 4},
        "evaluation": {"prompts": episodes(world, 1, 1), "frames": False},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    return parse_recipe({**base, **changes})
