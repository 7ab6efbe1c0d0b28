"""The premise of Video-OPD, measured before any arm: the teacher is right about the colours that it knows and wrong
about the others, and the student writes intervals, sees something, and is well behind the teacher.

python -m reproductions.video_opd_premise runs/video-opd-premise --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from opd.api import assembled
from opd.evaluation import evaluate
from opd.recipe import parse_recipe
from opd.reproductions import Gate, Stage
from opd.reproductions.definition import Figures
from opd.verifiers.temporal_grounding import Interval
from reproductions.video_opd_models import (
    HALF_TAUGHT,
    KNOWN,
    NEW_TEACHER,
    SECONDS,
    SLACK,
    STAGES,
    START,
    TEACHER,
    Split,
    clips,
    counts,
    recipe,
)


def measured(
    folder: Path, model: Path, *, size: int, split: Split, seed: int, of: str = "interval"
) -> dict[str, dict[str, float]]:
    """Of a model's greedy answers, by prompt id with the colour that is asked for: `iou` with the true intervals (or
    those `of` loose annotators) of `size` clips of all colours, `blind`, the overlap of one interval that answers all
    of them best, `parsed`, and `count`, whether about `size / 4` clips are counted right."""
    rows = [clips(size, split, **({} if of == "interval" else {"slack": SLACK})), counts(max(1, size // 4), split)]
    own = {
        "prompts": [clips(2, "train")],
        "verifier": {"routes": {"when": {"kind": "temporal_grounding", "interval": of}}},
        "rollout": {"kind": "data"},
        "objective": ["sft"],
        "evaluation": {"prompts": rows, "greedy": True},
        "tracking": {"trackers": []},
        "seed": seed,
        "output": str(folder),
    }
    run = assembled(parse_recipe(recipe(str(model), 1, 0.0, **own), "recipe of this measurement"))
    result = evaluate(run)
    found: dict[str, dict[str, float]] = {"iou": {}, "count": {}}
    for prompt in run.held_out:
        value = result.items["greedy_accuracy"][prompt.id]
        if prompt.source == 0:
            found["iou"][f"{prompt.id} {prompt.fields['prompt'].split()[1]}"] = value
        else:
            found["count"][prompt.id] = value
    true = [Interval(*prompt.fields[of]) for prompt in run.held_out if prompt.source == 0]
    return {**found, "blind": {"all": blind(true)}, "parsed": {"all": result.metrics["greedy_parsed"]}}


def blind(true: Sequence[Interval]) -> float:
    """Mean overlap of the one interval, on half seconds, that overlaps most with all of `true`: what is reached
    without looking."""
    times = [k / 2 for k in range(2 * SECONDS + 1)]
    guesses = (Interval(start, end) for start in times for end in times if start < end)
    return max(sum(guess.iou(each) for each in true) / len(true) for guess in guesses)


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def of_colours(values: Mapping[str, float], known: bool) -> dict[str, float]:
    """Those of colours that the teacher knows, or of the others."""
    return {name: value for name, value in values.items() if (name.split()[-1] in KNOWN) == known}


def premise(folder: Path, inputs: Mapping[str, Path], *, size: int, seed: int) -> Figures:
    """What decides whether the claims can be tested, on clips that no arm is tested on.

    Returns:
        `known` and `unknown`, the teacher's mean IoU by whether it knows the colour; `start`, `parsed` and `count` of
        the start of this seed; `blind`, that of the one interval that overlaps best with all; `sees`, how much more
        than such an interval the start overlaps with loose annotations, as it was taught; and `headroom`, what the
        teacher has over the start on colours that it knows.
    """
    teacher = measured(
        folder / "teacher", inputs[TEACHER] / "run" / "student", size=size, split="validation", seed=seed
    )
    start = measured(folder / "start", inputs[START] / "run" / "student", size=size, split="validation", seed=seed)
    loose = measured(
        folder / "loose", inputs[START] / "run" / "student", size=size, split="validation", seed=seed, of="annotated"
    )
    sides = {name: of_colours(teacher["iou"], name == "known") for name in ("known", "unknown")}
    found = {name: mean(values) if values else float("nan") for name, values in sides.items()}
    behind = of_colours(start["iou"], True)
    return {
        **found,
        "start": mean(start["iou"]),
        "blind": start["blind"]["all"],
        "sees": mean(loose["iou"]) - loose["blind"]["all"],
        "headroom": found["known"] - mean(behind) if behind else float("nan"),
        "parsed": start["parsed"]["all"],
        "count": mean(start["count"]),
    }


STAGE = Stage(premise, {"size": 400}, [TEACHER, START], per_seed=True)
GATES = [
    Gate("premise", "known", at_least=0.75),
    Gate("premise", "unknown", at_most=0.45),
    Gate("premise", "sees", at_least=0.05),
    Gate("premise", "headroom", at_least=0.15),
    Gate("premise", "parsed", at_least=0.98),
    Gate("premise", "count", at_least=0.5),
]
"""Held by the teacher, and by the start of every seed. What the teacher does not know is what focusing takes out; a
start that does not write intervals has nothing to be scored, and one that is no better than one interval for all clips
would first have to learn to see, which takes far more than an arm's updates."""


def verdict(figures: Figures) -> tuple[bool, list[str]]:
    """Whether the premise holds for one seed, and a line for each of its conditions."""
    lines, holds = [], True
    for gate in GATES:
        value, _ = gate.measured("premise", figures)
        passed = gate.passes(value)
        holds &= passed
        lines.append(f"{gate.figure}: {value:.3f}, wanted {gate.limit}: {'yes' if passed else 'NO'}")
    return holds, lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make teacher and start of each seed where they are missing; measure.")
    parser.add_argument("folder", type=Path, help="gets a folder for the teacher and one for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages = {**{name: STAGES[name] for name in (NEW_TEACHER, HALF_TAUGHT, TEACHER, START)}, "premise": STAGE}
    for seed in options.seeds:
        places: dict[str, Path] = {}
        for name, stage in stages.items():
            places[name] = options.folder / (str(seed) if stage.per_seed else "shared") / name
            done = places[name] / "job.json"
            if not done.exists():
                places[name].mkdir(parents=True, exist_ok=True)
                started = time.process_time()
                inputs = {wanted: places[wanted] for wanted in stage.inputs}
                own = {"seed": seed} if stage.per_seed else {}
                figures = stage.function(places[name], inputs, **{**stage.params, **own})
                record = {"figures": figures, "cpu_seconds": time.process_time() - started}
                done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            record = json.loads(done.read_text(encoding="utf-8"))
            print(f"seed {seed}, {name}: {record['cpu_seconds']:.0f} CPU seconds", flush=True)
            points = {point["step"]: round(point["accuracy"], 3) for point in record["figures"].get("curve", ())}
            if points:
                print(f"mean overlap by step: {points}", flush=True)
        print(*verdict(record["figures"])[1], sep="\n", flush=True)


if __name__ == "__main__":
    main()
