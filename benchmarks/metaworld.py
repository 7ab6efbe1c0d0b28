"""VLA-OPD in a real simulator: three tasks of Meta-World from its state, a start that saw few demonstrations, and what
distillation from the package's scripted experts and GRPO make of it with as many episodes.

python -m benchmarks.metaworld FOLDER [--seeds 0 1 2] [--json PATH]    (needs `pip install metaworld`)

What is in FOLDER is not run again. Success is of greedy episodes from states that nothing else began in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_operator import describe_machine, versions
from opd.acting.creation import create_policy
from opd.api import assembled, execute, export
from opd.environments.metaworld import MetaWorld
from opd.evaluation import evaluate
from opd.jobs.demonstrations import sample_demonstrations
from opd.recipe import parse_recipe
from opd.reproductions.definition import merged

TASKS = ("reach-v3", "push-v3", "drawer-open-v3")
LIMIT, CHUNK, BINS = 100, 5, 32
FEW, GOAL = 5, 0.3
"""Demonstrations of each task that a start imitates, and the share of validation episodes at which it is taken."""
IMITATED, EVERY = 600, 50
STEPS, EPISODES = 12, 24
DEMONSTRATED, TRAIN, VALIDATION, TEST = 3, 2, 1, 0
"""Seeds of initial states."""
PER_TASK = 20
Points = list[dict[str, float]]


def episodes(per_task: int, seed: int) -> dict[str, Any]:
    world = {"kind": "metaworld", "only": list(TASKS), "limit": LIMIT}
    return {"kind": "episodes", "environment": world, "per_task": per_task, "seed": seed}


def recipe(student: Path, folder: Path, steps: int, seed: int, **changes: Any) -> dict[str, Any]:
    base = {
        "steps": steps,
        "seed": seed,
        "output": str(folder / "run"),
        "student": {"kind": "action_tokens", "model": str(student)},
        "rollout": {"kind": "simulator"},
        "prompts": episodes(200, TRAIN),
        "update": {"learning_rate": 3e-4},
        "batch": {"prompts": EPISODES // 2, "group": 2, "micro": 64},
        "evaluation": {"prompts": episodes(5, VALIDATION), "frames": False, "samples": 0, "alarm": None, "every": 0},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    return merged(base, changes)


def trained(block: Mapping[str, Any]) -> Points:
    """One point an evaluation: success so far, and the simulator's steps and CPU seconds of training until then."""
    spent, points = dict.fromkeys(("simulator_steps", "cpu_seconds"), 0.0), []
    for record in execute(parse_recipe(block), quiet=True).history:
        for name in spent:
            spent[name] += record.get(f"train/{name}", 0.0)
        if "held_out/accuracy" in record:
            points.append({"step": record["step"], "accuracy": record["held_out/accuracy"], **spent})
    return points


def begun(folder: Path, seed: int) -> Points:
    """The first checkpoint of imitation that reaches the goal, in `folder/start`; the last where none does."""
    settings = MetaWorld(only=list(TASKS), limit=LIMIT)
    sizes = {"chunk": CHUNK, "bins": BINS, "width": 96, "layers": 3, "heads": 3}
    blank = create_policy(
        folder / "blank", settings.body(), list(settings.tasks().values()), reads=["state"], seed=seed, **sizes
    )
    shown = {
        "teacher": {"kind": "scripted", "name": "expert"},
        "prompts": episodes(FEW, DEMONSTRATED + seed),
        "rollout": {"kind": "simulator", "teacher": "expert", "greedy": True},
        "objective": "sft",
    }
    sample_demonstrations(parse_recipe(recipe(blank, folder / "shown", 1, seed, **shown)), folder / "data", quiet=True)
    block = recipe(blank, folder, IMITATED, seed)
    block |= {
        "prompts": {"kind": "demonstrations", "path": str(folder / "data"), "per_task": FEW},
        "rollout": {"kind": "demonstrations"},
        "objective": "sft",
        "batch": {"prompts": FEW * len(TASKS), "group": 1, "micro": 64},
        "update": {"learning_rate": 1e-3},
        "evaluation": {**block["evaluation"], "every": EVERY},
        "checkpoint": {"every": EVERY, "keep_last": IMITATED // EVERY},
    }
    points = trained(block)
    reached = [point for point in points if point["step"] > 0 and point["accuracy"] >= GOAL]
    export(folder / "run", folder / "start", int((reached or points[-1:])[0]["step"]))
    return points


def tested(model: Path, folder: Path, seed: int) -> dict[str, float]:
    """Success on test states, of all tasks and of each."""
    own = {"objective": "grpo", "evaluation": {"prompts": episodes(PER_TASK, TEST)}}
    run = assembled(parse_recipe(recipe(model, folder / "test", 1, seed, **own)))
    try:
        found = evaluate(run).metrics
    finally:
        run.rollout.close()
    return {name: found[name] for name in ("accuracy", *(f"accuracy/{task}" for task in TASKS))}


ARMS: dict[str, dict[str, Any]] = {
    "VLA-OPD": {"teacher": {"kind": "scripted"}, "objective": "reverse_kl_sampled"},
    "GRPO": {
        "objective": {"kind": "grpo", "clip": 0.2, "clip_high": 0.28},
        "batch": {"prompts": EPISODES // 8, "group": 8},
    },
}


def of_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Start and arms of one seed, each kept in a file of its own as soon as it is there."""
    found: dict[str, Any] = {}
    for name in ("start", *ARMS):
        place = folder / str(seed) / name
        done = place / "done.json"
        if not done.exists():
            place.mkdir(parents=True)
            start = folder / str(seed) / "start" / "start"
            if name == "start":
                points, model = begun(place, seed), start
            else:
                points, model = trained(recipe(start, place, STEPS, seed, **ARMS[name])), place / "run" / "student"
            record = {"training": points[-1], **tested(model, place, seed)}
            done.write_text(json.dumps(record) + "\n", encoding="utf-8")
        found[name] = json.loads(done.read_text(encoding="utf-8"))
        shares = ", ".join(f"{task} {found[name][f'accuracy/{task}']:.2f}" for task in TASKS)
        print(f"seed {seed}, {name}: {found[name]['accuracy']:.3f} ({shares})", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    seeds = {seed: of_seed(options.folder, seed) for seed in options.seeds}
    for name in ("start", *ARMS):
        values = [found[name]["accuracy"] for found in seeds.values()]
        steps = statistics.mean(found[name]["training"]["simulator_steps"] for found in seeds.values())
        print(f"{name}: success {statistics.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)}), "
              f"{steps:.0f} simulator steps of training")  # fmt: skip
    if options.json:
        record = {
            "command": "python -m benchmarks.metaworld FOLDER",
            "machine": describe_machine("cpu"),
            "versions": versions(),
            "cpu_seconds": time.process_time() - began,
            "seeds": seeds,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
