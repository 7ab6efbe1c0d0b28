"""The premise of Vision-OPD, measured before any arm: the start reads crops, and is middling on whole pictures.

python -m reproductions.vision_opd_premise runs/vision-opd-premise --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from opd.api import assembled
from opd.evaluation import evaluate
from opd.recipe import parse_recipe
from opd.reproductions import Gate, Stage
from opd.reproductions.definition import Figures
from reproductions.vision_opd_models import HELD_OUT, NEW, STAGES, START, Split, recipe, tiles, viewed

CROPS, OTHERS = 1, 2
"""Seeds of the draws whose crops are shown and of those with held-out characters; whole pictures have 0."""


def measured(folder: Path, model: Path, *, size: int, split: Split, seed: int) -> dict[str, dict[str, float]]:
    """Whether a model's greedy answers are right, 1 or 0 by prompt id: `full` and `crop` about `size` tiles each, over
    the whole picture or the tile's surroundings, and `held_out` about `size / 2` tiles with characters that no arm
    trains, over their surroundings. Ids end with the right character."""
    rows = {
        "full": viewed(size, split, "clean"),
        "crop": viewed(size, split, "crop", CROPS),
        "held_out": viewed(max(1, size // 2), split, "crop", OTHERS, HELD_OUT),
    }
    own = {
        "prompts": [tiles(2, "train", answer="answer")],
        "rollout": {"kind": "data"},
        "objective": ["sft"],
        "evaluation": {"prompts": list(rows.values()), "greedy": True},
        "tracking": {"trackers": []},
        "seed": seed,
        "output": str(folder),
    }
    run = assembled(parse_recipe(recipe(str(model), 1, 0.0, **own), "recipe of this measurement"))
    right = evaluate(run).items["greedy_accuracy"]
    found: dict[str, dict[str, float]] = {name: {} for name in rows}
    for prompt in run.held_out:
        answer = str(prompt.fields["answer"]).split()[-1]
        found[list(rows)[prompt.source]][f"{prompt.id} {answer}"] = right[prompt.id]
    return found


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def by_sign(values: Mapping[str, float]) -> dict[str, float]:
    """Share that is right of each character that was asked for."""
    signs = sorted({name.split()[-1] for name in values})
    return {sign: mean({n: v for n, v in values.items() if n.split()[-1] == sign}) for sign in signs}


def premise(folder: Path, inputs: Mapping[str, Path], *, size: int, seed: int) -> Figures:
    """What decides whether the claims can be tested on the start of this seed, on prompts that no arm is tested on.

    Returns:
        `full`, `crop` and `held_out`, shares of right answers; `gap`, crop less full; `full_by_sign` and
        `crop_by_sign`, by the character asked for.
    """
    found = measured(folder / "measured", inputs[START] / "start", size=size, split="validation", seed=seed)
    shares = {name: mean(values) for name, values in found.items()}
    classes = {f"{name}_by_sign": by_sign(found[name]) for name in ("full", "crop")}
    return {**shares, "gap": shares["crop"] - shares["full"], **classes}


STAGE = Stage(premise, {"size": 440}, [START], per_seed=True)
GATES = [
    Gate("premise", "crop", at_least=0.95),
    Gate("premise", "crop_by_sign", at_least=0.75, worst=True),
    Gate("premise", "full", at_least=0.3),
    Gate("premise", "full", at_most=0.65),
    Gate("premise", "held_out", at_least=0.7),
]
"""Held by the start of every seed. Over crops every character must be read, since what the teacher does not know it
cannot teach; over whole pictures a character may never be right, which is what is to be mended."""


def verdict(figures: Figures) -> tuple[bool, list[str]]:
    """Whether the premise holds for one seed, and a line for each of its conditions."""
    lines, holds = [], True
    for gate in GATES:
        value, worst = gate.measured("premise", figures)
        passed = gate.passes(value)
        holds &= passed
        where = f" ({worst}, the worst class)" if worst else ""
        lines.append(f"{gate.figure}: {value:.3f}{where}, wanted {gate.limit}: {'yes' if passed else 'NO'}")
    return holds, lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the start of each seed where it is missing and measure it.")
    parser.add_argument("folder", type=Path, help="gets a folder for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        places: dict[str, Path] = {}
        for name, stage in {NEW: STAGES[NEW], START: STAGES[START], "premise": STAGE}.items():
            places[name] = options.folder / str(seed) / name
            done = places[name] / "job.json"
            if not done.exists():
                places[name].mkdir(parents=True, exist_ok=True)
                started = time.process_time()
                inputs = {wanted: places[wanted] for wanted in stage.inputs}
                figures = stage.function(places[name], inputs, **stage.params, seed=seed)
                record = {"figures": figures, "cpu_seconds": time.process_time() - started}
                done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            record = json.loads(done.read_text(encoding="utf-8"))
            print(f"seed {seed}, {name}: {record['cpu_seconds']:.0f} CPU seconds", flush=True)
            if name == START:
                curve = {point["step"]: round(point["accuracy"], 3) for point in record["figures"]["curve"]}
                print(f"whole pictures by step: {curve}; taken at {record['figures']['start_step']:g}", flush=True)
        print(*verdict(record["figures"])[1], sep="\n", flush=True)


if __name__ == "__main__":
    main()
