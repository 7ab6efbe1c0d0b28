"""Is a store whose jobs are killed again and again the store of jobs that were left alone?

`python -m benchmarks.kill_store --kills 20 [--json PATH]`: `opd rollout` and `opd score` (exact targets) of a small
transformer, two workers side by side on one store, both ended by SIGKILL at a random moment and started again. Goal:
every file equals that of an undisturbed store, byte by byte, no file is left over, and some kills fell while a shard
was claimed.

A process is forked from one that has only imported the libraries; importing them anew would take most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.kill_test import fork
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.recipe import Recipe, parse_recipe
from opd.store import Store, Targets
from tests.conftest import save_tiny

WORKERS = 2
Job = Callable[[Recipe, Path], object]


def roll_out(recipe: Recipe, path: Path) -> Store:
    return sample(recipe, path, draws=2, prompts_per_shard=2, quiet=True)


def score_all(recipe: Recipe, path: Path) -> Targets:
    return score(recipe, path, "exact", name="t", quiet=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)
    kills = claimed = 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe_for(save_tiny(Path(scratch) / "model", width=64, layers=4))
        whole = Path(scratch) / "whole"
        lifetimes = []
        for job in (roll_out, score_all):
            started = time.perf_counter()
            wait([start(job, recipe, whole)], whole)
            lifetimes.append(time.perf_counter() - started)
        while kills < arguments.kills:
            path = Path(scratch) / f"killed-{kills}"
            for job, lifetime in zip((roll_out, score_all), lifetimes, strict=True):
                for _ in range(5):
                    workers = [start(job, recipe, path) for _ in range(WORKERS)]
                    time.sleep(chance.uniform(0.1, 0.7) * lifetime)
                    for worker in workers:
                        os.kill(worker, signal.SIGKILL)
                        os.waitpid(worker, 0)
                        kills += 1
                    claimed += len(list(path.rglob("*.lock"))) > 0
                wait([start(job, recipe, path) for _ in range(WORKERS)], path)
                wait([start(job, recipe, path)], path)
            wrong += differences(whole, path)
    met = not wrong and claimed > 0
    if arguments.json:
        command = f"python -m benchmarks.kill_store --kills {arguments.kills} --seed {arguments.seed}"
        result = {"command": command, "kills": kills, "with_a_claim": claimed, "differences": wrong}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"kill_store: {kills} kills, a shard was claimed at {claimed} moments of them; "
        f"{'every file equal' if not wrong else '; '.join(wrong[:4])} (goal: every file equal, some with a claim): "
        f"{'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


def recipe_for(model: str) -> Recipe:
    data = {
        "student": {"model": model, "template": "plain"},
        "teacher": {"model": model, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": [f"{a}+{b}=" for a in range(1, 8) for b in range(1, 8)]},
        "rollout": {"max_new_tokens": 40},
        "batch": {"prompts": 8, "group": 2},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
    }
    return parse_recipe(data)


def start(job: Job, recipe: Recipe, path: Path) -> int:
    """A worker in a process of its own; its messages go beside the store."""
    return fork(lambda: job(recipe, path), path.with_suffix(".messages"))


def wait(workers: list[int], path: Path) -> None:
    statuses = [os.waitpid(worker, 0)[1] for worker in workers]
    if any(statuses):
        raise SystemExit(f"kill_store: MISSED: a job could not go on\n{path.with_suffix('.messages').read_text()}")


def differences(one: Path, other: Path) -> list[str]:
    """Files that only one of two stores has, and files that are not equal."""
    ours, theirs = ({p.relative_to(path) for p in path.rglob("*") if p.is_file()} for path in (one, other))
    found = [f"{other.name}: {name} in one only" for name in sorted(ours ^ theirs)]
    for name in sorted(ours & theirs):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{other.name}: {name}")
    return found


if __name__ == "__main__":
    sys.exit(main())
