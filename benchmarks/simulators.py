"""Environment steps a second with several simulators, and what share of a step of training they take.

`python -m benchmarks.simulators` plays the scripted expert in the pixel task (`--metaworld`: in Meta-World's reach) in
this process and in 1, 2 and 4 of their own, and then trains a few steps of VLA-OPD on the pixel task.
`--quick` plays less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.whole import execute_whole
from opd.acting.creation import create_policy
from opd.environments import Start
from opd.environments.arena import Arena
from opd.environments.control import Control, ControlOrder
from opd.environments.metaworld import MetaWorld
from opd.environments.pixel_pick import PixelPick
from opd.recipe import parse_recipe

CHUNK = 4


def steps_a_second(environment: Control, processes: int, episodes: int) -> float:
    """Of `episodes` of the expert side by side, chunk by chunk; starting the processes is not counted."""
    arena, task = Arena(processes), next(iter(environment.tasks()))
    try:
        chunks = arena.play([ControlOrder(i, environment, Start(task, i), CHUNK) for i in range(episodes)])
        places = {i: chunk for i, chunk in enumerate(chunks) if chunk is not None}
        began, steps = time.perf_counter(), 0
        while places:
            orders = [ControlOrder(i, environment, chunk.plan.mean, CHUNK) for i, chunk in places.items() if chunk.plan]
            found = arena.play(orders)
            steps += sum(chunk.played for chunk in found if chunk is not None)
            places = {o.place: c for o, c in zip(orders, found, strict=True) if c is not None and not c.turn.over}
        return steps / (time.perf_counter() - began)
    finally:
        arena.close()


def share(steps: int) -> tuple[float, float]:
    """`(seconds of simulators, seconds)` of the training steps behind the first."""
    environment = PixelPick()
    with tempfile.TemporaryDirectory() as folder:
        create_policy(Path(folder) / "policy", environment.body(), list(environment.tasks().values()))
        rows = {"kind": "episodes", "environment": environment.model_dump(mode="json"), "per_task": 20}
        recipe = {
            "steps": steps + 1,
            "output": str(Path(folder) / "run"),
            "student": {"kind": "action_tokens", "model": str(Path(folder) / "policy")},
            "teacher": "scripted",
            "prompts": rows,
            "rollout": "simulator",
            "objective": "reverse_kl_sampled",
            "batch": {"prompts": 16, "group": 4, "micro": 32},
            "evaluation": {"prompts": rows | {"per_task": 1, "seed": 1}, "frames": False},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
        }
        history = [row for row in execute_whole(parse_recipe(recipe)).history if "train/loss" in row][1:]
    return tuple(sum(row[f"train/{name}"] for row in history) for name in ("simulator_seconds", "seconds/step"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few episodes, one step")
    parser.add_argument("--metaworld", action="store_true", help="Meta-World's reach in place of the pixel task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment: Control = MetaWorld(only=["reach-v3"]) if options.metaworld else PixelPick()
    for processes in (0, 1, 2, 4):
        rate = steps_a_second(environment, processes, 8 if options.quick else 64)
        named = "one process" if processes == 1 else f"{processes or 'no'} processes"
        print(f"{named}: {rate:.0f} environment steps a second", flush=True)
    simulated, whole = share(1 if options.quick else 5)
    print(f"a step of training takes {whole:.1f} s, the simulator {simulated / whole:.0%} of it")


if __name__ == "__main__":
    main()
