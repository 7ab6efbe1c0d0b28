"""VLA-OPD in a real simulator: three tasks of Meta-World from its state, a start that saw few demonstrations, and what
distillation from the package's scripted experts and GRPO make of it with as many episodes.

python -m benchmarks.metaworld FOLDER [--seeds 0 1 2] [--json PATH]    (needs `pip install metaworld`)

What is in FOLDER is not run again, so that seeds may be run side by side once the first has found the rates. Each arm
takes the rate of `RATES` that has most success on validation episodes after a third of the steps from the first seed's
start. Success is of greedy episodes from states that nothing else began in.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_operator import describe_machine, versions
from benchmarks.whole import execute_whole
from opd.acting.creation import create_policy
from opd.acting.lerobot import ranges
from opd.api import assembled, export
from opd.environments.metaworld import MetaWorld
from opd.evaluation import evaluate
from opd.jobs.demonstrations import sample_demonstrations
from opd.recipe import parse_recipe
from opd.reproductions.definition import merged

TASKS = ("reach-v3", "push-v3", "drawer-open-v3")
LIMIT, CHUNK, BINS = 100, 5, 32
FEW, GOAL = 5, 0.3
"""Demonstrations of each task that a start imitates, and the share of validation episodes at which it is taken."""
IMITATED, EVERY = 300, 50
EPISODES, TRIED = 900, 300
"""Of an arm, and of a trial of a rate."""
RATES = (1e-4, 3e-4, 1e-3)
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
        "batch": {"prompts": len(TASKS), "group": 1, "micro": 64},
        "evaluation": {"prompts": episodes(10, VALIDATION), "frames": False, "samples": 0, "alarm": None, "every": 0},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    return merged(base, changes)


def trained(block: Mapping[str, Any]) -> Points:
    """One point an evaluation: success so far, and the simulator's steps and CPU seconds of training until then."""
    spent, points = dict.fromkeys(("simulator_steps", "cpu_seconds"), 0.0), []
    for record in execute_whole(parse_recipe(block)).history:
        for name in spent:
            spent[name] += record.get(f"train/{name}", 0.0)
        if "held_out/accuracy" in record:
            points.append({"step": record["step"], "accuracy": record["held_out/accuracy"], **spent})
    return points


def begun(folder: Path, seed: int) -> Points:
    """The first checkpoint of imitation that reaches the goal, in `folder/start`; the last where none does."""
    settings = MetaWorld(only=list(TASKS), limit=LIMIT)
    sizes = {"chunk": CHUNK, "bins": BINS, "width": 96, "layers": 3, "heads": 3}
    body, words = settings.body(), list(settings.tasks().values())
    # Whose chunks the experts' actions are cut into; the policy that learns is made in the range of what they showed.
    cut = create_policy(folder / "cut", body, words, reads=["state"], seed=seed, **sizes)
    shown = {
        "teacher": {"kind": "scripted", "name": "expert"},
        "prompts": episodes(FEW, DEMONSTRATED + seed),
        "rollout": {"kind": "simulator", "teacher": "expert", "greedy": True},
        "objective": "sft",
    }
    sample_demonstrations(parse_recipe(recipe(cut, folder / "shown", 1, seed, **shown)), folder / "data", quiet=True)
    seen = ranges(folder / "data")
    blank = create_policy(folder / "blank", body, words, reads=["state"], seen=seen, seed=seed, **sizes)
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
    own = {"objective": "grpo", "batch": {"group": 2}, "evaluation": {"prompts": episodes(PER_TASK, TEST)}}
    run = assembled(parse_recipe(recipe(model, folder / "test", 1, seed, **own)))
    try:
        found = evaluate(run).metrics
    finally:
        run.rollout.close()
    return {name: found[name] for name in ("accuracy", *(f"accuracy/{task}" for task in TASKS))}


ARMS: dict[str, dict[str, Any]] = {
    "VLA-OPD": {"teacher": {"kind": "scripted"}, "objective": "forward_kl"},
    "GRPO": {
        "objective": {"kind": "grpo", "clip": 0.2, "clip_high": 0.28},
        "batch": {"prompts": 1, "group": 8},
    },
}


def distilled(start: Path, place: Path, name: str, count: int, rate: float, seed: int) -> dict[str, Any]:
    """The recipe of an arm for `count` episodes."""
    block = recipe(start, place, 1, seed, **ARMS[name])
    rates = {"kind": "cosine", "start": rate, "warmup": 5}
    return merged(
        block,
        {"steps": count // (block["batch"]["prompts"] * block["batch"]["group"]), "update": {"learning_rate": rates}},
    )


def kept(place: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, from a file where it was made before."""
    done = place / "done.json"
    if not done.exists():
        place.mkdir(parents=True)
        done.write_text(json.dumps(make()) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return found


def best_rate(folder: Path, name: str) -> float:
    """By success on validation episodes, the smaller of equals."""
    start, tried = folder / "0" / "start" / "start", {}
    for rate in RATES:
        place = folder / "rates" / name / str(rate)
        point = kept(place, partial(lambda p, r: trained(distilled(start, p, name, TRIED, r, 100))[-1], place, rate))
        tried[rate] = point["accuracy"]
        print(f"{name} at {rate:g}: {point['accuracy']:.3f} on validation", flush=True)
    return max(tried, key=lambda rate: (tried[rate], -rate))


def of_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Start and arms of one seed."""
    start = folder / str(seed) / "start" / "start"

    def made(name: str, place: Path) -> dict[str, Any]:
        if name == "start":
            points, model = begun(place, seed), start
        else:
            block = distilled(start, place, name, EPISODES, best_rate(folder, name), seed)
            points, model = trained(block), place / "run" / "student"
        return {"training": points[-1], **tested(model, place, seed)}

    found: dict[str, Any] = {}
    for name in ("start", *ARMS):
        place = folder / str(seed) / name
        found[name] = kept(place, partial(made, name, place))
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
            "cpu_seconds_of_training": sum(
                arm["training"].get("cpu_seconds", 0.0) for of in seeds.values() for arm in of.values()
            ),
            "rates": {name: best_rate(options.folder, name) for name in ARMS},
            "seeds": seeds,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
