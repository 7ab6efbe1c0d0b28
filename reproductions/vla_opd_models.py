"""The task of the reproduction of VLA-OPD, its teacher, and the start of every arm.

Ten tasks of the pixel world: a thing that the instruction names is to be put on the ring. The teacher saw fifty
demonstrations of each task and went on by success alone; a start saw few, and is the first checkpoint that succeeds in
a fixed share of episodes. Both are policies of one size that see pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.acting.creation import create_policy
from opd.api import assembled, execute, export
from opd.environments.pixel_pick import PixelPick
from opd.errors import RunError
from opd.evaluation import evaluate
from opd.jobs.demonstrations import sample_demonstrations
from opd.recipe import parse_recipe
from opd.reproductions import Stage
from opd.reproductions.definition import COSTS, Figures, merged
from opd.reproductions.training import filled

SUITE, PIXELS = "object", 32
SEEN = ["red_block", "red_ball", "green_block", "green_ball", "blue_block", "blue_ball"]
"""Tasks that arms train on."""
HELD_OUT = ["yellow_block", "yellow_ball", "purple_block", "purple_ball"]
"""Tasks that the start knows as well as the others and that no arm trains: what may be forgotten."""
SIZES: dict[str, Any] = {"chunk": 4, "bins": 32, "patch": 8, "width": 96, "layers": 3, "heads": 3}
FEW, MANY = 3, 50
"""Demonstrations of each task that a start and the teacher see."""
GOAL = 0.35
"""Share of episodes in which a start succeeds: in 0.2 to 0.6 the paper's argument can be tested."""
TRAIN, VALIDATION, TEST = 2, 1, 0
"""Seeds of initial states."""


def world(only: Sequence[str] = ()) -> dict[str, Any]:
    return {"kind": "pixel_pick", "suite": SUITE, "pixels": PIXELS, "only": list(only)}


def episodes(per_task: int, seed: int, only: Sequence[str] = ()) -> dict[str, Any]:
    return {"kind": "episodes", "environment": world(only), "per_task": per_task, "seed": seed}


def recipe(student: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A recipe on the pixel world; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": {"kind": "action_tokens", "model": student},
        "rollout": {"kind": "simulator"},
        "update": {"learning_rate": {"kind": "constant", "start": rate, "warmup": 5}},
        "batch": {"prompts": 16, "group": 4, "micro": 64},
        "evaluation": {"frames": False, "samples": 0, "alarm": None},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "self_test": False,
    }
    return merged(base, changes)


def imitation(student: str, data: str, per_task: int, steps: int, rate: float = 1e-3, **changes: Any) -> dict[str, Any]:
    """Behaviour cloning of `per_task` demonstrations of each task."""
    own = {
        "prompts": {"kind": "demonstrations", "path": data, "per_task": per_task},
        "rollout": {"kind": "demonstrations"},
        "objective": ["sft"],
        "update": {"learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": 10}},
        "batch": {"prompts": 30, "group": 1, "micro": 64},
    }
    base = recipe(student, steps, rate)
    return merged({**base, "rollout": {}, "update": {}} | own, changes)


# -- the jobs ----------------------------------------------------------------------------------------------------------


def blank(folder: Path, inputs: Mapping[str, Path], *, seed: int) -> Figures:
    """A policy with random weights in `folder/model`."""
    settings = PixelPick(**{name: value for name, value in world().items() if name != "kind"})
    create_policy(folder / "model", settings.body(), list(settings.tasks().values()), seed=seed, **SIZES)
    return {}


def demonstrated(
    folder: Path, inputs: Mapping[str, Path], *, of: str, per_task: int, only: Sequence[str] = (), seed: int = 0
) -> Figures:
    """The scripted expert's episodes as a data set in `folder/data`."""
    own = {
        "teacher": {"kind": "scripted", "name": "expert"},
        "prompts": episodes(per_task, 100 + seed, only),
        "rollout": {"kind": "simulator", "teacher": "expert", "greedy": True},
        "objective": ["sft"],
        "batch": {"prompts": 16, "group": 1},
        "evaluation": {"prompts": episodes(1, VALIDATION)},
        "output": str(folder / "run"),
    }
    kept, played = sample_demonstrations(
        parse_recipe(recipe(str(inputs[of] / "model"), 1, 0.0, **own)), folder / "data", quiet=True
    )
    return {"kept": float(kept), "played": float(played)}


def run_of(folder: Path, inputs: Mapping[str, Path], block: Mapping[str, Any], seed: int) -> Figures:
    """Train a recipe in `folder/run`: the last held-out metrics and what training cost until each evaluation,
    environment steps among it."""
    values = {"tracking": {"trackers": []}, **filled(block, inputs), "seed": seed, "output": str(folder / "run")}
    result = execute(parse_recipe(values, "recipe of this arm"), quiet=True)
    if result.stopped_by is not None:
        raise RunError(f"training was stopped by signal {result.stopped_by}")
    costs = dict.fromkeys((*COSTS, "simulator_steps"), 0.0)
    points = []
    for record in result.history:
        for name in costs:
            costs[name] += record.get(f"train/{name}", 0.0)
        metrics = {n.removeprefix("held_out/"): v for n, v in record.items() if n.startswith("held_out/")}
        if metrics:
            points.append({"step": record["step"], **costs, **metrics})
    return {**{name: value for name, value in points[-1].items() if name != "step"}, "curve": points}


def taught(
    folder: Path, inputs: Mapping[str, Path], *, imitate: Mapping[str, Any], improve: Mapping[str, Any], seed: int
) -> Figures:
    """The teacher in `folder/run/student`: imitation, and then success alone. What it took to get there is returned
    too."""
    before = run_of(folder / "imitation", inputs, imitate, seed)
    own = {"student": {"model": str(folder / "imitation" / "run" / "student")}}
    after = run_of(folder, inputs, merged(improve, own), seed)
    return {**after, "imitated": before["accuracy"]}


def started(folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], goal: float, seed: int) -> Figures:
    """The first checkpoint whose success reaches `goal`, in `folder/start`; the last one where none does."""
    found = run_of(folder, inputs, recipe, seed)
    points = found["curve"]
    reached = [point for point in points if point["step"] > 0 and point["accuracy"] >= goal]
    step = int((reached or points[-1:])[0]["step"])
    export(folder / "run", folder / "start", step)
    return {"start_step": float(step), "curve": points}


def success(folder: Path, model: Path, rows: Mapping[str, Any], seed: int, **changes: Any) -> dict[str, float]:
    """Held-out metrics of a policy that is not trained."""
    own = {
        "prompts": episodes(1, TRAIN),
        "objective": ["grpo"],
        "evaluation": {"prompts": rows},
        "tracking": {"trackers": []},
        "seed": seed,
        "output": str(folder),
    }
    run = assembled(parse_recipe(recipe(str(model), 1, 0.0, **merged(own, changes)), "recipe of this measurement"))
    try:
        return dict(evaluate(run).metrics)
    finally:
        run.rollout.close()


NEW, DATA, TEACHER, START = "new", "demonstrations", "teacher", "start"
NEW_TEACHER, TEACHERS_DATA = "new teacher", "teacher's demonstrations"
SEEDS_OF_TEACHER = 100

STAGES: dict[str, Stage] = {
    NEW_TEACHER: Stage(blank, {"seed": SEEDS_OF_TEACHER}),
    TEACHERS_DATA: Stage(demonstrated, {"of": NEW_TEACHER, "per_task": MANY, "seed": SEEDS_OF_TEACHER}, [NEW_TEACHER]),
    TEACHER: Stage(
        taught,
        {
            "imitate": imitation(
                f"{{{NEW_TEACHER}}}/model",
                f"{{{TEACHERS_DATA}}}/data",
                MANY,
                1500,
                evaluation={"prompts": episodes(10, VALIDATION), "every": 250},
            ),
            "improve": recipe(
                "",
                100,
                1e-4,
                prompts=episodes(400, TRAIN),
                objective=[{"kind": "grpo", "clip": 0.2, "clip_high": 0.28}],
                batch={"prompts": 16, "group": 8},
                evaluation={"prompts": episodes(10, VALIDATION), "every": 20},
            ),
            "seed": SEEDS_OF_TEACHER,
        },
        [NEW_TEACHER, TEACHERS_DATA],
    ),
    NEW: Stage(blank, per_seed=True),
    DATA: Stage(demonstrated, {"of": NEW, "per_task": FEW}, [NEW], per_seed=True),
    START: Stage(
        started,
        {
            "recipe": imitation(
                f"{{{NEW}}}/model",
                f"{{{DATA}}}/data",
                FEW,
                1000,
                evaluation={"prompts": episodes(10, VALIDATION), "every": 50},
                checkpoint={"every": 50, "keep_last": 1000},
            ),
            "goal": GOAL,
        },
        [NEW, DATA],
        per_seed=True,
    ),
}
