"""Prune-OPD (arXiv 2605.07804): spend rollouts only where the teacher still helps."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from opd.reproductions import Claim, Reproduction, Smoke, Stage
from opd.reproductions.definition import COSTS, Figures, merged
from reproductions.on_policy import at_rate, best_rate
from reproductions.prune_opd_models import CAP, SAVED, STAGES, STUDENT, TEACHER_C, TEACHER_D, TERMS
from reproductions.prune_opd_premise import GATES, STAGE, K
from reproductions.running_sum import figures_of, prompts, recipe, student_tested

STEPS, BATCH, RATES = 100, 32, (2e-5, 1e-4, 5e-4)
TAU, DROP, BASE, MARGIN = 0.75, 1 / 12, 0.5, 0.02
WINDOW = {"minimum": 48, "maximum": CAP, "by": 8, "margin": 8, "hits": 0.1, "patience": 3}
TEST = {"prompts": prompts(TERMS, 400, "test"), "max_new_tokens": CAP, "samples": 0, "k": 4, "greedy": True}
TEACHERS = {"D": TEACHER_D, "C": TEACHER_C}

SIGNAL: dict[str, Any] = {"kind": "overlap", "k": K, "below": TAU}
SHAPING: dict[str, Any] = {"kind": "drift", "signal": SIGNAL, "drop": DROP, "base": BASE}
WINDOWED: dict[str, Any] = {"curriculum": {"kind": "window", **WINDOW}}
WATCHED: dict[str, Any] = {"rollout": {"segment": 8, "watch": {"kind": "drift", "signal": SIGNAL, "drop": DROP}}}

FULL, PRUNED = "full OPD", "Prune-OPD"
TRACES: dict[str, Literal["mean", "shuffled"]] = {"fixed length": "mean", "shuffled window": "shuffled"}
ARMS: dict[str, dict[str, Any]] = {
    FULL: {},
    PRUNED: {"shaping": SHAPING, **WINDOWED},
    "weights only": {"shaping": SHAPING},
    "window only": {"shaping": {**SHAPING, "weigh": False}, **WINDOWED},
    "in-flight": {"shaping": SHAPING, **WATCHED},
    "fixed length": {"shaping": SHAPING},
    "shuffled window": {"shaping": SHAPING},
}
"""What each changes of plain OPD; the last two also take the window of Prune-OPD from the run of the same seed."""


def arm(pair: str, name: str) -> str:
    return f"{pair}: {name}"


# -- the jobs ----------------------------------------------------------------------------------------------------------


def distilled(pair: str, changes: Mapping[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """OPD of the student from one of the two teachers; its learning rate is put in when it is known."""
    validation = {"prompts": prompts(TERMS, 256, "validation"), "max_new_tokens": CAP, "samples": 0, "every": 25}
    own = {"evaluation": validation, "checkpoint": {"every": 0}, "batch": {"prompts": BATCH, "micro": BATCH}}
    teacher = f"{{{TEACHERS[pair]}}}/{SAVED}"
    return merged(recipe(f"{{{STUDENT}}}/{SAVED}", TERMS, CAP, steps, 0.0, teacher, **own), changes)


def trained(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    test: Mapping[str, Any],
    rate: str,
    window: str = "",
    trace: Literal["mean", "shuffled"] = "mean",
    seed: int,
) -> Figures:
    """Train a student of one seed at the rate that a stage chose, and test it; with the lengths of its rollouts.

    `window` names a run of this seed whose windows this one's rollouts take: their `mean` at each step, or each of them
    at another step, `shuffled`.
    """
    block = at_rate(recipe, figures_of(inputs[rate])["rate"])
    if window:
        longest = followed(figures_of(inputs[window])["windows"], trace, seed)
        block = merged(block, {"rollout": {"max_new_tokens": longest}})
    models = {name: place for name, place in inputs.items() if name not in (rate, window)}
    figures = student_tested(folder, models, recipe=block, test=test, seed=seed)
    return {**figures, **lengths_of(folder / "run")}


def followed(windows: list[float], trace: Literal["mean", "shuffled"], seed: int) -> int | dict[str, Any]:
    """Longest rollouts: as long as windows are on average, or as they are in another order."""
    if trace == "mean":
        return round(sum(windows) / len(windows))
    others = [round(window) for window in windows]
    random.Random(seed).shuffle(others)
    return {"kind": "hold", "points": [[step, window] for step, window in enumerate(others)]}


LOGGED = {
    "windows": "curriculum/window",
    "effective_lengths": "curriculum/effective_length",
    "overlaps": "overlap",
    "stopped": "stopped",
    "lengths": "length",
}
"""What is kept of every step, by its name in the log."""


def lengths_of(run: Path) -> Figures:
    """Step by step what `LOGGED` names, where it is logged; of the window and of some others the mean and the last."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "train/loss" in record]
    found: Figures = {
        name: [step[f"train/{key}"] for step in steps]
        for name, key in LOGGED.items()
        if all(f"train/{key}" in step for step in steps)
    }
    means = {f"mean_{name.removesuffix('s')}": sum(values) / len(values) for name, values in found.items()}
    return {**found, **means, **({"last_window": found["windows"][-1]} if "windows" in found else {})}


def compared(folder: Path, inputs: Mapping[str, Path], *, of: str, full: str, seed: int) -> Figures:
    """What a run measured, with its costs as shares of what full OPD of the same seed took."""
    own, whole = figures_of(inputs[of]), figures_of(inputs[full])
    shares = {f"{name}_of_full": own[name] / whole[name] for name in COSTS}
    return {**{name: value for name, value in own.items() if name not in LOGGED}, **shares}


def rate_stage(name: str) -> str:
    return f"rate of {name}"


def training(pair: str, name: str) -> Stage:
    """Training of an arm; Prune-OPD's parts take its rate, and full OPD has its own."""
    rate = rate_stage(arm(pair, FULL if name == FULL else PRUNED))
    params = {"recipe": distilled(pair, ARMS[name]), "test": TEST, "rate": rate}
    inputs = [STUDENT, TEACHERS[pair], rate]
    if name in TRACES:
        window = f"student of {arm(pair, PRUNED)}"
        return Stage(trained, {**params, "window": window, "trace": TRACES[name]}, [*inputs, window], per_seed=True)
    return Stage(trained, params, inputs, per_seed=True)


TRAINED = [*(("D", name) for name in ARMS), ("C", FULL), ("C", PRUNED)]
TUNED = [(pair, name) for pair in TEACHERS for name in (FULL, PRUNED)]
