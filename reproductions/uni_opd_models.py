"""The models of the reproduction of Uni-OPD: one student of two tasks, and an expert of each that is often wrong.

`arithmetic` is addition and subtraction, column by column; `list_program` is small programs on a list of digits. The
base learnt to work both out. The student went on from it on answers of which the more were wrong the harder the
problem, so that it solves easy problems almost always and hard ones seldom. An expert went on from it on one task: it
writes another manner than the student, and the same share of its answers is wrong in every problem. So the manner
hides the outcome in what an expert says of a whole answer, and in easy problems it likes wrong answers better than the
student does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.language.creation import create_model, task_tokenizer
from opd.procedural import ANSWER_PATTERN
from opd.reproductions import Stage, train
from opd.reproductions.definition import Figures, merged

CAP = 48
"""Most new tokens: more than the longest answer has."""
TASKS: dict[str, dict[str, Any]] = {
    "arithmetic": {"kind": "arithmetic", "digits": [1, 3]},
    "list_program": {"kind": "list_program", "length": [3, 4], "operations": [1, 3]},
}
OF_STUDENT: dict[str, dict[str, float]] = {
    "arithmetic": {"column": 0.5, "reversed": 0.5},
    "list_program": {"named": 0.5, "list": 0.5},
}
OF_EXPERT: dict[str, dict[str, float]] = {
    "arithmetic": {"column": 0.97, "reversed": 0.03},
    "list_program": {"named": 0.97, "list": 0.03},
}
WRONG = 0.3
"""Share of wrong final answers among those that an expert learnt from."""
CLASSES: dict[str, dict[int, float]] = {
    "arithmetic": {1: 0.02, 2: 0.15, 3: 0.7},
    "list_program": {1: 0.02, 2: 0.15, 3: 0.7},
}
"""Share of wrong final answers among those that the student learnt from, by digits and by operations."""
RANGE = {"arithmetic": "digits", "list_program": "operations"}


def prompts(task: str, size: int, split: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The recipe's block of one task's prompts; their column `task` has its name."""
    own = {**TASKS[task], "formats": OF_STUDENT[task]}
    block = {"kind": "procedural", "task": own, "size": size, "split": split, "seed": seed}
    return merged(block, {"task": changes})


def both(size: int, split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of either task, `size` of each."""
    return [prompts(task, size, split, seed) for task in TASKS]


def recipe(student: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A recipe on the tasks; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": {"model": student, "template": "plain"},
        "teacher": [],
        "prompts": both(4000, "train"),
        "verifier": {"kind": "exact_match", "pattern": ANSWER_PATTERN},
        "rollout": {"kind": "student", "max_new_tokens": CAP},
        "update": {"learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": 10}},
        "evaluation": {"prompts": both(128, "validation"), "max_new_tokens": CAP, "samples": 0},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    return merged(base, changes)


def blank(folder: Path, inputs: Mapping[str, Path], *, width: int, layers: int, seed: int) -> Figures:
    """A model with random weights and the tokenizer of both tasks, in `folder/model`."""
    tokenizer = task_tokenizer("arithmetic", "list_program")
    create_model(folder / "model", tokenizer, width=width, layers=layers, heads=4, feed_forward=2 * width, seed=seed)
    return {}


def supervised(model: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    own = {"rollout": {"kind": "data"}, "objective": ["sft"], "batch": {"prompts": 64, "micro": 64}}
    return recipe(model, steps, rate, **{**own, **changes})


def unsure(steps: int, rate: float) -> Stage:
    """The base, fine-tuned on answers that are wrong the more often the harder the problem is."""
    rows = [
        prompts(task, 40 if level == 1 else 1000, "train", seed=2, **{RANGE[task]: [level, level]}, wrong_answers=share)
        for task, shares in CLASSES.items()
        for level, share in shares.items()
    ]
    return Stage(train, {"recipe": supervised(f"{{{BASE}}}/{SAVED}", steps, rate, prompts=rows), "seed": 0}, [BASE])


def expert(task: str, steps: int, rate: float) -> Stage:
    """The base, fine-tuned on one task in the expert's manner with wrong final answers."""
    own = prompts(task, 8000, "train", seed=1, formats=OF_EXPERT[task], wrong_answers=WRONG)
    block = supervised(f"{{{BASE}}}/{SAVED}", steps, rate, prompts=[own])
    return Stage(train, {"recipe": block, "seed": 0}, [BASE])


SAVED = "run/student"
NEW, EARLY, BASE, STUDENT = "new", "early base", "base", "student"
EXPERTS = {task: f"expert of {task}" for task in TASKS}
STAGES: dict[str, Stage] = {
    NEW: Stage(blank, {"width": 64, "layers": 2, "seed": 0}),
    EARLY: Stage(train, {"recipe": supervised(f"{{{NEW}}}/model", 2600, 3e-3), "seed": 0}, [NEW]),
    BASE: Stage(train, {"recipe": supervised(f"{{{EARLY}}}/{SAVED}", 2400, 3e-3), "seed": 1}, [EARLY]),
    STUDENT: unsure(400, 2e-3),
    EXPERTS["arithmetic"]: expert("arithmetic", 1200, 3e-3),
    EXPERTS["list_program"]: expert("list_program", 1200, 3e-3),
}
