"""The premise of Lightning OPD, measured before any arm: the fine-tuned student has something to learn, live
distillation teaches it, and at the rate at which both are compared the student stays near to who wrote the store.

    python -m reproductions.lightning_opd_premise runs/lightning-opd-premise --seeds 0
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd.reproductions import Gate, Stage
from opd.reproductions.definition import Figures
from reproductions.enumeration import gradient_gap
from reproductions.lightning_opd_jobs import Test, distilled
from reproductions.lightning_opd_models import (
    BUDGET,
    MODELS,
    SAVED,
    TERMS,
    fine_tuned,
    live,
    offline,
    sft,
    store_of,
    teacher,
)
from reproductions.running_sum import figures_of, prompts, tested

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
DRIFT = 0.1
"""The paper's: below it settles the spread of the ratios of probability, now over then, of the tokens trained on."""
LEAST_GAIN = 0.05
"""What live distillation must gain at that rate: with less, keeping up with it would say nothing."""
TRIALS = (100, 101)
"""Seeds of the students that rates are chosen on. No arm has them."""
VALIDATION = {"prompts": prompts(TERMS, 500, "validation", seed=1), "max_new_tokens": BUDGET, "samples": 0, "k": 2}
WAYS = ("live", "Lightning")


def trial(way: str, seed: int) -> str:
    return f"trial of {way}, seed {seed}"


def of_trial(seed: int) -> str:
    return f"SFT of trial {seed}"


def store_of_trial(seed: int) -> str:
    return f"store of trial {seed}"


def tried(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    rates: Sequence[float],
    test: Test,
    start: str,
    store: str = "",
    seed: int,
) -> Figures:
    """One way of training at every rate, from one student, on validation problems: `accuracy` of each by its rate, with
    a store also `drift`, and `before`, the student's own accuracy."""
    (folder / "before").mkdir()
    before = tested(folder / "before", inputs, student=f"{{{start}}}/{SAVED}", test=test, seed=seed)
    found = {}
    for rate in rates:
        place = folder / f"{rate:g}"
        place.mkdir()
        found[f"{rate:g}"] = distilled(place, inputs, recipe=recipe, rate=rate, test=test, store=store, seed=seed)
    drifts = {rate: one["drift_std_in_sample"] for rate, one in found.items() if "drift_std_in_sample" in one}
    return {
        "before": before["test_accuracy"],
        "accuracy": {rate: one["test_accuracy"] for rate, one in found.items()},
        **({"drift": drifts} if drifts else {}),
    }


def ruled(
    folder: Path, inputs: Mapping[str, Path], *, rates: Sequence[float], seeds: Sequence[int], limit: float
) -> Figures:
    """The rates that arms take, from the trials.

    Returns:
        `rate`: the highest one up to which the drift on a store is below `limit` with every seed, or the lowest where
        there is none; `drift` and `live_gain` at it, by seed; `best_live` and `best_lightning`, by mean accuracy on
        validation problems; and what the trials measured at each rate.
    """
    online, stored = ([figures_of(inputs[trial(way, seed)]) for seed in seeds] for way in WAYS)
    names = [f"{rate:g}" for rate in rates]
    worst = {rate: max(one["drift"][rate] for one in stored) for rate in names}
    within = [rate for i, rate in enumerate(names) if all(worst[lower] < limit for lower in names[: i + 1])]
    chosen = within[-1] if within else names[0]

    def mean(found: Sequence[Figures], rate: str) -> float:
        return sum(float(one["accuracy"][rate]) for one in found) / len(found)

    return {
        "rate": float(chosen),
        "drift": {str(seed): one["drift"][chosen] for seed, one in zip(seeds, stored, strict=True)},
        "live_gain": {
            str(seed): one["accuracy"][chosen] - one["before"] for seed, one in zip(seeds, online, strict=True)
        },
        "best_live": float(max(names, key=lambda rate: mean(online, rate))),
        "best_lightning": float(max(names, key=lambda rate: mean(stored, rate))),
        **{f"drift at {rate}": worst[rate] for rate in names},
        **{
            f"{way} at {rate}": mean(found, rate)
            for way, found in zip(WAYS, (online, stored), strict=True)
            for rate in names
        },
    }


def trials(seed: int) -> dict[str, Stage]:
    """A student of a seed that no arm has, its store, and both ways at every rate."""
    start, place = of_trial(seed), store_of_trial(seed)
    shared = {"rates": list(RATES), "test": VALIDATION, "start": start, "seed": seed}
    stored = {"recipe": offline(start, place, "A"), "store": place, **shared}
    return {
        start: fine_tuned("A", seed=seed),
        place: store_of(start, {"A": {"teacher": "A"}}, seed=seed),
        trial("live", seed): Stage(tried, {"recipe": live(start, "A"), **shared}, [start, teacher("A")]),
        trial("Lightning", seed): Stage(tried, stored, [start, place]),
    }


RULE = "rates"
STAGES: dict[str, Stage] = {
    "theory": Stage(gradient_gap, {"distances": [0.01, 0.1, 0.3, 1.0], "other": 0.5}),
    **MODELS,
    **{name: stage for seed in TRIALS for name, stage in trials(seed).items()},
    RULE: Stage(
        ruled,
        {"rates": list(RATES), "seeds": list(TRIALS), "limit": DRIFT},
        [trial(way, seed) for seed in TRIALS for way in WAYS],
    ),
}
LOW, HIGH = 0.3, 0.6
"""Accuracy at temperature 1 of a student to begin with. It is this accuracy that is claimed about: near chance no small
step raises it, since an answer is right only where all its seven to eleven sums are. Greedy answers are right far more
often."""
SHARED_GATES = [
    Gate("theory", "t35_excess", at_most=1e-6),
    Gate("theory", "t37_error", at_most=1e-6),
    Gate("theory", "t38_excess", at_most=1e-6),
    Gate("theory", "gap_at_start", at_most=1e-6),
    Gate("theory", "growth", at_least=1.98),
    Gate("theory", "growth", at_most=2.02),
    Gate("teachers", "lowest", at_least=0.85),
    Gate("teachers", "spread", at_most=0.03),
]
"""Of both experiments: the theorems, by enumeration, and teachers of equal skill."""
HEADROOM = [
    gate
    for name in (*map(of_trial, TRIALS), sft("A"), sft("B"))
    for gate in (Gate(name, "accuracy", at_least=LOW), Gate(name, "accuracy", at_most=HIGH))
]
GATES = [
    *SHARED_GATES,
    *HEADROOM,
    Gate(RULE, "drift", at_most=DRIFT, worst=True),
    Gate(RULE, "live_gain", at_least=LEAST_GAIN, worst=True),
]
"""Held by every seed. A student that is nearly always right has nothing left to gain; one that drifts is beyond what
the paper presupposes; and where live gains nothing, keeping up with it is no feat."""


def verdicts(name: str, figures: Figures) -> list[str]:
    """A line for each condition on a stage."""
    lines = []
    for gate in GATES:
        if gate.stage == name:
            value, worst = gate.measured(name, figures)
            where = f" (seed {worst})" if worst else ""
            lines.append(
                f"{gate.figure}: {value:.4g}{where}, wanted {gate.limit}: {'yes' if gate.passes(value) else 'NO'}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make models and trials where they are missing and measure the premise."
    )
    parser.add_argument("folder", type=Path, help="gets a folder for each stage")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of the arms' students to measure as well")
    parser.add_argument("--until", choices=list(STAGES), help="stop behind this stage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    places: dict[str, Path] = {}
    for name, stage in STAGES.items():
        places[name] = options.folder / name
        _made(name, stage, places, name)
        if name == options.until:
            return
    for seed in options.seeds:
        for by in ("A", "B"):
            name = sft(by)
            places[name] = options.folder / f"{name}, seed {seed}"
            _made(name, fine_tuned(by, seed=seed), places, f"{name}, seed {seed}")


def _made(name: str, stage: Stage, places: Mapping[str, Path], said: str) -> None:
    done = places[name] / "job.json"
    if not done.exists():
        places[name].mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        figures = stage.function(places[name], {wanted: places[wanted] for wanted in stage.inputs}, **stage.params)
        record = {"figures": figures, "cpu_seconds": time.process_time() - started}
        done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(done.read_text(encoding="utf-8"))
    shown = {n: v for n, v in record["figures"].items() if n not in ("items", "curve")}
    print(f"{said}: {record['cpu_seconds']:.0f} CPU seconds, {json.dumps(shown)}", flush=True)
    for line in verdicts(name, record["figures"]):
        print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
