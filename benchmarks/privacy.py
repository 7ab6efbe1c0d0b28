"""What privacy costs: `python -m benchmarks.privacy [--quick] --json PATH`.

Steps of the plain update and of the private one, batched and one by one, on the same work: SmolLM2-135M with LoRA, the
same 8 prompts with the same 64 tokens of response, cross-entropy. All sides live in one process of one thread and take
turns step by step, in another order each round; CPU seconds of the process, wall seconds beside them, medians of eight
rounds after one that warms up. Peak memory is that of a process of its own for each side. `--quick` takes a model of
random weights and two rounds: it shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.alternation import silence, versions_and_machine, write
from benchmarks.sizes import SMOLLM2
from opd.api import assembled
from opd.curricula import Draw
from opd.language.creation import create_model, symbol_tokenizer
from opd.loop import accumulate_step, move
from opd.measurement import Clock, Measurement
from opd.provenance import peak_memory_bytes
from opd.recipe import parse_recipe
from opd.run import Run

PRIVATE = {"kind": "differentially_private", "noise_multiplier": 1.0, "accountant": "rdp"}
SIDES: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain"},
    "private, batched": {**PRIVATE, "gradients": "batched"},
    "private, one by one": {**PRIVATE, "gradients": "one_by_one"},
}
BATCH, TOKENS, ROUNDS = 8, 64, 8
DATA = Path(__file__).parent.parent / "recipes" / "data" / "instructions.jsonl"


def side(name: str, model: str, lora: bool, folder: Path) -> Run:
    """A built run of one side, which this benchmark steps itself."""
    texts = [json.loads(line)["prompt"] for line in DATA.read_text(encoding="utf-8").splitlines()][: 2 * BATCH]
    rows = [{"prompt": a, "response": 8 * f"{b} "} for a, b in zip(texts[:BATCH], texts[BATCH:], strict=True)]
    private = name != "plain"
    recipe = {
        "steps": 1000,
        "student": {"model": model, "template": "plain", **({"lora": {"rank": 16}} if lora else {})},
        "prompts": {"kind": "inline", "prompts": rows},
        "curriculum": "poisson" if private else "shuffled",
        "rollout": {"kind": "data", "max_new_tokens": TOKENS},
        "objective": "sft",
        "reduction": "sequence_mean",
        "update": {"learning_rate": 1e-4, **SIDES[name]},
        "batch": {"prompts": BATCH, "micro": BATCH},
        "evaluation": {"prompts": {"kind": "inline", "prompts": ["public"]}},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
        "output": str(folder / name.replace(", ", "-").replace(" ", "-")),
    }
    return assembled(parse_recipe(recipe))


def step(run: Run) -> None:
    """One step of the loop on all prompts, without logs and measurements."""
    now, clock = run.at(run.step), Clock()
    measurement = Measurement(now.recipe.objective)
    prompts = list(run.course.prompts)  # type: ignore[attr-defined]  # of both curricula
    accumulate_step(run, now, Draw(prompts), clock, measurement)
    move(run, now, measurement)
    run.step += 1


def timed(model: str, lora: bool, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of a step of each side, and how many times the plain one that is."""
    runs = {name: side(name, model, lora, folder) for name in SIDES}
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in SIDES}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for name in order.sample(list(SIDES), len(SIDES)):
            cpu, wall = time.process_time(), time.perf_counter()
            step(runs[name])
            if turn:
                found[name]["cpu"].append(time.process_time() - cpu)
                found[name]["wall"].append(time.perf_counter() - wall)
    medians = {name: {clock: statistics.median(v) for clock, v in each.items()} for name, each in found.items()}
    for each in medians.values():
        each["times_plain"] = each["cpu"] / medians["plain"]["cpu"]
    return medians


def peak(name: str, model: str, lora: bool, folder: Path) -> dict[str, int]:
    """Peak bytes of this process before and after two steps of one side."""
    run = side(name, model, lora, folder)
    before = peak_memory_bytes()
    step(run)
    step(run)
    return {"built": before, "peak": peak_memory_bytes()}


def peaks(model: str, lora: bool, folder: Path) -> dict[str, dict[str, int]]:
    found = {}
    for name in SIDES:
        command = [
            sys.executable,
            "-m",
            "benchmarks.privacy",
            "--side",
            name,
            "--model",
            model,
            "--folder",
            str(folder / "peak"),
        ]
        done = subprocess.run([*command, *(["--lora"] if lora else [])], capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="random weights and two rounds, to see that it runs")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--side", choices=SIDES, help="measure the memory of this side alone, in this process")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    if options.side is not None:
        print(json.dumps(peak(options.side, options.model, options.lora, options.folder)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, lora = SMOLLM2, True
        if options.quick:
            texts = DATA.read_text(encoding="utf-8")
            create_model(folder / "model", symbol_tokenizer(sorted(set(texts))), width=32)
            model, lora = str(folder / "model"), False
        report = {
            **versions_and_machine(),
            "work": {"model": "random" if options.quick else SMOLLM2, "lora": lora, "batch": BATCH, "tokens": TOKENS},
            "step": timed(model, lora, 2 if options.quick else ROUNDS, folder),
            "memory": peaks(model, lora, folder),
        }
    for name in SIDES:
        seconds, memory = report["step"][name], report["memory"][name]
        print(
            f"{name}: {seconds['cpu']:.3f} CPU s a step, {seconds['times_plain']:.2f} times plain; "
            f"peak {memory['peak'] / 2**20:.0f} MiB, {memory['built'] / 2**20:.0f} before the first step"
        )
    if options.json is not None:
        write(options.json, report)


if __name__ == "__main__":
    main()
