"""The task of the reproduction of Vision-OPD, and the model that every arm starts from.

Pictures of 96 pixels hold six coloured tiles with a character each, and the question is which character stands on the
tile of one colour. The same model is asked over the whole picture or over the tile's surroundings, enlarged. It learnt
from reference answers, mostly over crops, and of its checkpoints the first is taken that gets a fixed share of whole
pictures right, so that it reads crops and finds half of the tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opd.api import execute, export
from opd.errors import RunError
from opd.prompts.tiles import SYMBOLS
from opd.recipe import parse_recipe
from opd.reproductions import Stage
from opd.reproductions.definition import Figures, merged
from opd.reproductions.training import curve, filled
from opd.vision.creation import create_image_text_model

ALPHABET = "347ACEHKLTX"
"""Characters that differ in more than a stroke."""
HELD_OUT = "259PU"
"""Characters that the start learnt to read over crops and that no arm trains: what may be forgotten."""
CAP = 4
"""Most new tokens: an answer has a colour, a character and the end."""
MIX = {"crops": 26, "whole pictures": 8, "held out": 6}
"""Rows of each kind in a step of the start's training, on average."""
ENDS, EVERY, GOAL = (150, 200, 250, 300, 350), 5, 0.34
"""Where training may end, steps between checkpoints, and the share of whole pictures, sampled, at which the start is
taken; greedy answers are right a tenth more often there."""
MARGIN = 0.5
"""Round a crop, as a share of the tile: it is 32 pixels wide, of the picture's 96."""

View = Literal["boxed", "clean", "crop"]
Split = Literal["train", "validation", "test"]


def tiles(size: int, split: Split, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The recipe's block of questions about whole pictures."""
    return {"kind": "tiles", "size": size, "split": split, "seed": seed, "alphabet": ALPHABET} | changes


def viewed(
    size: int, split: Split, view: View, seed: int = 0, alphabet: str = ALPHABET, **changes: Any
) -> dict[str, Any]:
    """The same, with a crop for whoever sees one; `view` is the student's. The model knows no hint in words."""
    rows = tiles(size, split, seed, alphabet=alphabet)
    return {"kind": "boxed", "of": rows, "view": view, "hint": None, "margin": MARGIN, "answer": "answer", **changes}


def recipe(student: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A recipe on tiles; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": {"kind": "image_text", "model": student},
        "teacher": [],
        "verifier": "exact_match",
        "rollout": {"kind": "student", "max_new_tokens": CAP},
        "reduction": "sequence_mean",
        "update": {
            "learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": 10},
            "betas": [0.9, 0.98],
        },
        "batch": {"prompts": 32, "micro": 42},
        "evaluation": {"max_new_tokens": CAP, "samples": 0, "alarm": None},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "self_test": False,
    }
    return merged(base, changes)


def blank(folder: Path, inputs: Mapping[str, Path], *, seed: int) -> Figures:
    """A model with random weights and its processor, in `folder/model`: 0.4 million parameters, one layer that reads
    pictures and two of text."""
    create_image_text_model(folder / "model", SYMBOLS, seed=seed)
    return {}


def supervised(model: str) -> dict[str, Any]:
    """Fine-tuning on reference answers, with a checkpoint at every evaluation on whole pictures."""
    prompts = [
        viewed(1500, "train", "crop", 1, weight=MIX["crops"]),
        tiles(1500, "train", 2, answer="answer", weight=MIX["whole pictures"]),
        viewed(800, "train", "crop", 3, HELD_OUT, weight=MIX["held out"]),
    ]
    return recipe(
        model,
        ENDS[-1],
        2e-3,
        prompts=prompts,
        rollout={"kind": "data"},
        objective=["sft"],
        update={"learning_rate": {"kind": "constant", "start": 2e-3, "warmup": 50}},
        batch={"prompts": sum(MIX.values())},
        evaluation={"prompts": [tiles(160, "validation", 2, answer="answer")], "every": EVERY},
        checkpoint={"every": EVERY, "keep_last": ENDS[-1] // EVERY},
    )


def taught(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], goal: float, ends: Sequence[int], seed: int
) -> Figures:
    """Train up to the first of the steps `ends` by which an evaluation had `goal` of the whole pictures right, and
    write that checkpoint to `folder/start`; the last one where none had, which the gates see.

    Returns:
        `start_step`, and `curve`, the held-out metrics by step.
    """
    points: dict[int, dict[str, float]] = {}
    for i, end in enumerate(ends):
        values = {"tracking": {"trackers": []}, **filled(recipe, inputs), "seed": seed, "output": str(folder / "run")}
        settings = parse_recipe({**values, "steps": end}, "recipe of the start")
        result = execute(settings, quiet=True, resume=i > 0, force_changed=i > 0)
        if result.stopped_by is not None:
            raise RunError(f"training was stopped by signal {result.stopped_by}")
        points |= {int(point["step"]): point for point in curve(result.history)}
        step, reached = first_at(list(points.values()), goal)
        if reached:
            break
    export(folder / "run", folder / "start", step)
    return {"start_step": float(step), "curve": list(points.values())}


def first_at(points: Sequence[Mapping[str, float]], goal: float) -> tuple[int, bool]:
    """The step of the first point behind the start whose accuracy reaches `goal`, else of the last point; and which."""
    reached = [point for point in points if point["step"] > 0 and point["accuracy"] >= goal]
    return int((reached or points[-1:])[0]["step"]), bool(reached)


NEW, START = "new", "start"
OF_RATES = {name: f"{name} of rates" for name in (NEW, START)}
"""The same with a seed that no arm has, for the choice of learning rates."""
SEED_OF_RATES = 100


def _start(of: str, **own: Any) -> Stage:
    params = {"recipe": supervised(f"{{{of}}}/model"), "goal": GOAL, "ends": list(ENDS), **own}
    return Stage(taught, params, [of], per_seed=not own)


STAGES: dict[str, Stage] = {
    NEW: Stage(blank, per_seed=True),
    START: _start(NEW),
    OF_RATES[NEW]: Stage(blank, {"seed": SEED_OF_RATES}),
    OF_RATES[START]: _start(OF_RATES[NEW], seed=SEED_OF_RATES),
}
