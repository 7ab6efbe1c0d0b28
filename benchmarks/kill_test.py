"""Does a run that is killed again and again end with the weights of one that was left alone?

`python -m benchmarks.kill_test --kills 20 [--json PATH]` trains a small transformer whose teacher follows it by a
moving average, on the CPU in float32, with a checkpoint after every step. Its process is ended by SIGKILL, half of the
times at a random moment of its life and half of the times at a random moment of writing a checkpoint, and the run is
resumed. Goal: checkpoint, student and logs at the end equal those of an undisturbed run bit for bit, some kills fell
inside a write, and no kill left a directory that cannot be resumed.

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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from opd.api import execute
from opd.checkpoints.store import UnusableError, folder_of, steps_stored, verify
from opd.recipe import Recipe, parse_recipe
from tests.conftest import save_tiny

STEPS = 60
WRITES = 4
"""A kill inside a write picks one of the first so many of its process."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)
    kills: list[dict[str, Any]] = []
    ends: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = save_tiny(Path(scratch) / "model", width=128, layers=4)
        undisturbed = recipe_for(model, Path(scratch) / "undisturbed")
        started = time.perf_counter()
        run_to_end(undisturbed)
        lifetime = time.perf_counter() - started
        while len(kills) < arguments.kills:
            recipe = recipe_for(model, Path(scratch) / f"killed-{len(ends)}")
            while len(kills) < arguments.kills and run_and_kill(recipe, kills, chance, lifetime):
                print(f"kill {len(kills)}: {kills[-1]}", file=sys.stderr)
            run_to_end(recipe)
            ends.append(difference(undisturbed.directory, recipe.directory))
    inside, unusable = (sum(kill[key] for kill in kills) for key in ("inside_a_write", "unusable"))
    met = not any(ends) and inside > 0 and not unusable
    if arguments.json:
        result = {
            "command": f"python -m benchmarks.kill_test --kills {arguments.kills} --seed {arguments.seed}",
            "settings": {"steps": STEPS, "torch": torch.__version__},
            "kills": len(kills),
            "inside_a_write": inside,
            "unusable": unusable,
            "runs": len(ends),
            "differences": [end for end in ends if end],
            "each_kill": kills,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"kill_test: {len(kills)} kills, {inside} inside a write; {len(ends)} runs, "
        f"{'all bitwise equal' if not any(ends) else '; '.join(filter(None, ends))}; {unusable} directories unusable "
        f"(goal: bitwise equal, some inside a write, none unusable): {'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


def recipe_for(model: str, directory: Path) -> Recipe:
    rows = [{"prompt": f"{a}+{b}=", "hint": f"what is {a}+{b}?"} for a in range(1, 8) for b in range(1, 8)]
    return parse_recipe(
        {
            "output": str(directory),
            "steps": STEPS,
            "resume": "auto",
            "student": {"model": model, "template": "plain"},
            "teacher": {"kind": "self", "rate": 0.1, "sees": "hint"},
            "prompts": {"kind": "inline", "prompts": rows},
            "rollout": {"max_new_tokens": 16},
            "batch": {"prompts": 8, "micro": 4},
            "update": {"learning_rate": {"kind": "cosine", "start": 1e-2}},
            "evaluation": {"held_out": 4, "every": 7},
            "checkpoint": {"every": 1},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
        }
    )


def fork(work: Callable[[], object], messages: Path) -> int:
    """Start a process that does `work` and ends; what it prints is added to `messages`."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        output = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(recipe: Recipe) -> int:
    """A process that runs, or goes on with, the recipe; its messages go beside the run's directory."""
    return fork(lambda: execute(recipe, quiet=True), recipe.directory.with_suffix(".messages"))


def run_to_end(recipe: Recipe) -> None:
    _, status = os.waitpid(start(recipe), 0)
    if status:
        raise SystemExit(f"kill_test: MISSED: a run could not go on\n{messages_of(recipe)}")


def run_and_kill(recipe: Recipe, kills: list[dict[str, Any]], chance: random.Random, lifetime: float) -> bool:
    """Go on for a while and kill; False, and no kill counted, when the run came to its end before."""
    folder, pid = recipe.directory / "checkpoints", start(recipe)
    started, write = time.perf_counter(), len(kills) % 2
    before, seen, wanted = False, 0, chance.randint(1, WRITES)
    moment = chance.uniform(0, lifetime / 3)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"kill_test: MISSED: a run could not go on\n{messages_of(recipe)}")
            return False
        now = being_written(folder)
        seen += now and not before
        before = now
        if (write and now and seen == wanted) or (not write and time.perf_counter() - started > moment):
            break
        time.sleep(0.0002)
    # A write lasts some milliseconds; the first of them are the tensors, the last the renaming.
    time.sleep(chance.uniform(0, 0.02) if write else 0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    steps = steps_stored(recipe.directory)
    kill = {"seconds": round(time.perf_counter() - started, 3), "inside_a_write": being_written(folder)}
    kills.append({**kill, "step": steps[0] if steps else 0, "unusable": not usable(recipe, steps)})
    return True


def being_written(folder: Path) -> bool:
    """Whether a checkpoint is in the making, or was when its process died."""
    try:
        return any(entry.name.endswith(".partial") for entry in os.scandir(folder))
    except FileNotFoundError:
        return False


def usable(recipe: Recipe, steps: list[int]) -> bool:
    """Whether the newest checkpoint under its final name is whole; none at all is a run that starts again."""
    try:
        return not steps or bool(verify(folder_of(recipe.directory, steps[0])))
    except UnusableError:
        return False


def difference(one: Path, other: Path) -> str:
    """What of two finished runs is not the same; empty when nothing."""
    last = folder_of(Path(), STEPS)
    for name in (last / "tensors.safetensors", Path("student/model.safetensors")):
        if (one / name).read_bytes() != (other / name).read_bytes():
            return f"{other.name}/{name} differs"
    for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"):
        if without_times(one / name) != without_times(other / name):
            return f"{other.name}/{name} differs"
    return ""


def without_times(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in r.items() if "seconds" not in k and "per_second" not in k} for r in records]


def messages_of(recipe: Recipe) -> str:
    return recipe.directory.with_suffix(".messages").read_text()


if __name__ == "__main__":
    sys.exit(main())
