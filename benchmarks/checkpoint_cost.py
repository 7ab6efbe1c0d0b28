"""What does a checkpoint cost, in seconds and bytes, against the size of the model?

`python -m benchmarks.checkpoint_cost [--json PATH]` trains one step of transformers of several sizes in float32, all
weights and LoRA, then writes a checkpoint and reads it back, three times each. A write includes the sha256 of every
byte and waits until the disk has them; a read verifies all of them. Beside it, the seconds that the disk takes for as
many bytes alone (written and waited for), and those that the fingerprint of all weights that a checkpoint leaves out
takes, once a process. Goal: a full checkpoint takes no more than 12.1 bytes a trained parameter (weights and both
moments in float32, and 1 % for the rest).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from opd.assembly import assemble
from opd.checkpoints.store import folder_of, read, verify
from opd.files.whole import flush
from opd.loop import train
from opd.monitor import Monitor
from opd.recipe import parse_recipe
from opd.run import Run
from tests.conftest import save_tiny

SIZES = ((128, 8), (384, 9), (768, 9), (1024, 11))
"""Width and layers; from the second one on, the state of generators and the like is less than 1 % of a checkpoint."""

REPEATS = 3
GOAL = 12.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for width, layers in SIZES:
        for lora in (None, {"rank": 16}):
            with tempfile.TemporaryDirectory() as scratch:
                cells.append(measure(Path(scratch), width, layers, lora))
                print(json.dumps(cells[-1]), file=sys.stderr)
    worst = max(c["bytes"] / c["trained"] for c in cells[2:] if not c["lora"])
    if arguments.json:
        result = {
            "command": "python -m benchmarks.checkpoint_cost",
            "settings": {"torch": torch.__version__, "threads": 1, "repeats": REPEATS},
            "cells": cells,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    largest = next(c for c in reversed(cells) if not c["lora"])
    print(
        f"checkpoint_cost: {largest['trained'] / 1e6:.0f} M trained parameters in {largest['bytes'] / 2**20:.0f} MiB, "
        f"written in {statistics.median(largest['write']):.1f} s; {worst:.2f} bytes a parameter at most "
        f"(goal: {GOAL}): {'met' if worst <= GOAL else 'MISSED'}"
    )
    return 0 if worst <= GOAL else 1


def measure(folder: Path, width: int, layers: int, lora: dict[str, Any] | None) -> dict[str, Any]:
    """Seconds and bytes of one size, after a step that gives the optimiser its moments."""
    run = trained_run(folder, width, layers, lora)
    writes, reads, alone = [], [], []
    for _ in range(REPEATS):
        run.step += 1
        writes.append(seconds(lambda: run.checkpoints.write(run)))
        stored = folder_of(run.recipe.directory, run.step)
        reads.append(seconds(lambda stored=stored: (verify(stored), read(stored))))
        size = sum(path.stat().st_size for path in stored.iterdir())
        alone.append(seconds(lambda size=size: plain_write(folder / "plain", size)))
    parameters = list(run.student.module.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "lora": lora is not None,
        "bytes": size,
        "write": writes,
        "read": reads,
        "disk_alone": alone,
        "fingerprint": seconds(lambda: [part.fingerprint() for _, part in run.parts("fingerprint")]),
    }


def trained_run(folder: Path, width: int, layers: int, lora: dict[str, Any] | None) -> Run:
    model = save_tiny(folder / "model", width=width, layers=layers, intermediate_size=4 * width, initializer_range=0.02)
    recipe = parse_recipe(
        {
            "output": str(folder / "run"),
            "steps": 1,
            "student": {"model": model, "template": "plain", "lora": lora},
            "teacher": {"model": model, "template": "plain"},
            "prompts": {"kind": "inline", "prompts": ["1+1=", "1+2=", "2+2="]},
            "rollout": {"max_new_tokens": 4},
            "batch": {"prompts": 2},
            "evaluation": {"held_out": 1},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
            "checkpoint": {"every": 100, "keep_last": 1},
            "self_test": False,
        }
    )
    recipe.directory.mkdir()
    run = assemble(recipe, Monitor(recipe.directory, quiet=True))
    train(run)
    return run


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return round(time.perf_counter() - started, 4)


def plain_write(path: Path, size: int) -> None:
    block = bytes(2**22)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
    flush(path)
    path.unlink()


if __name__ == "__main__":
    sys.exit(main())
