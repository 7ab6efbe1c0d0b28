"""The task of the reproduction of VLA-OPD, its teacher, and the start of every arm.

Ten tasks of the pixel world: the grey thing is to be put on the ring whose colour the instruction names. One policy
learnt to see and to move from the scripted expert's episodes until it was middling, and is the base of the starts,
each of which then imitates few demonstrations of its own. The teacher sees the simulator's state in place of pictures,
learnt from the same expert for longer, and went on by success alone.
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

SUITE, PIXELS, TOLERANCE, UNSURE = "goal", 16, 1.5, 0.15
SEEN = ["block_red", "ball_red", "block_green", "ball_green", "block_blue", "ball_blue"]
"""Tasks that arms train on."""
HELD_OUT = ["block_yellow", "ball_yellow", "block_purple", "ball_purple"]
"""Tasks that the start knows as well as the others and that no arm trains: what may be forgotten."""
SIZES: dict[str, Any] = {"chunk": 4, "bins": 32, "patch": 4, "width": 96, "layers": 3, "heads": 3}
FEW, MANY = 5, 50
"""Demonstrations of each task that a start imitates, and that an arm on an expert's states has."""
BASE_STEPS, BASE_EVERY, TEACHER_STEPS = 2500, 100, 1500
BASE_GOAL, GOAL = 0.2, 0.3
"""Share of episodes in which the base and a start succeed: in 0.2 to 0.6 the paper's argument can be tested."""
TRAIN, VALIDATION, TEST, SHOWN, PLAYED = 2, 1, 0, 100, 5
"""Seeds of initial states; `SHOWN` plus the seed is of demonstrations, `PLAYED` of the base's episodes."""


def world(only: Sequence[str] = ()) -> dict[str, Any]:
    own = {"suite": SUITE, "pixels": PIXELS, "tolerance": TOLERANCE, "unsure": UNSURE}
    return {"kind": "pixel_pick", **own, "only": list(only)}


def episodes(per_task: int, seed: int, only: Sequence[str] = ()) -> dict[str, Any]:
    return {"kind": "episodes", "environment": world(only), "per_task": per_task, "seed": seed}


def recipe(student: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A recipe on the pixel world; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": {"kind": "action_tokens", "model": student},
        "rollout": {"kind": "simulator"},
        "update": {"learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": 5}},
        "batch": {"prompts": 8, "group": 4, "micro": 64},
        "evaluation": {"frames": False, "samples": 0, "alarm": None},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "self_test": False,
    }
    return merged(base, changes)


def imitation(student: str, data: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """Behaviour cloning of `FEW` demonstrations of each task."""
    own = {
        "prompts": {"kind": "demonstrations", "path": data, "per_task": FEW},
        "rollout": {"kind": "demonstrations"},
        "objective": ["sft"],
        "batch": {"prompts": 25, "group": 1},
    }
    return merged({**recipe(student, steps, rate), "rollout": {}} | {"rollout": own["rollout"]}, {**own, **changes})


# -- the jobs ----------------------------------------------------------------------------------------------------------


def blank(
    folder: Path, inputs: Mapping[str, Path], *, seed: int, reads: Sequence[str] = ("image", "proprio")
) -> Figures:
    """A policy with random weights in `folder/model`."""
    settings = PixelPick(**{name: value for name, value in world().items() if name != "kind"})
    tasks = list(settings.tasks().values())
    create_policy(folder / "model", settings.body(), tasks, reads=reads, seed=seed, **SIZES)
    return {}


def demonstrated(
    folder: Path, inputs: Mapping[str, Path], *, of: str, per_task: int, only: Sequence[str] = (), seed: int = 0
) -> Figures:
    """The scripted expert's episodes as a data set in `folder/data`."""
    own = {
        "teacher": {"kind": "scripted", "name": "expert"},
        "prompts": episodes(per_task, SHOWN + seed, only),
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


def based(folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], goal: float, seed: int) -> Figures:
    """Learn from the expert's own episodes: the first checkpoint that reaches `goal` in `folder/start`, the last in
    `folder/run/student`."""
    return started(folder, inputs, recipe=recipe, goal=goal, seed=seed)


def taught(
    folder: Path, inputs: Mapping[str, Path], *, imitate: Mapping[str, Any], improve: Mapping[str, Any], seed: int
) -> Figures:
    """The teacher in `folder/run/student`: the expert's episodes, and then success alone, whose cost is returned."""
    before = run_of(folder / "imitation", inputs, imitate, seed)
    own = {"student": {"model": str(folder / "imitation" / "run" / "student")}}
    return {**run_of(folder, inputs, merged(improve, own), seed), "imitated": before["accuracy"]}


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


NEW, BASE, DATA, TEACHER, START = "new", "base", "demonstrations", "teacher", "start"
NEW_TEACHER = "new teacher"
OF_RATES = {name: f"{name} of rates" for name in (DATA, START)}
"""The same with a seed that no arm has, for the choice of learning rates."""
SEED_OF_RATES = 100


def of_expert(new: str, steps: int, **changes: Any) -> dict[str, Any]:
    """The scripted expert's own episodes, by its distribution; no episode comes twice."""
    own = {
        "teacher": [{"kind": "scripted", "name": "expert"}],
        "rollout": {"kind": "simulator", "teacher": "expert", "greedy": True},
        "prompts": episodes(3000, PLAYED),
        "objective": ["forward_kl"],
        "batch": {"prompts": 30, "group": 1},
    }
    return recipe(f"{{{new}}}/model", steps, 1e-3, **{**own, **changes})


def _start(data: str, **own: Any) -> Stage:
    block = imitation(
        f"{{{BASE}}}/start",
        f"{{{data}}}/data",
        80,
        2e-4,
        evaluation={"prompts": episodes(10, VALIDATION), "every": 10},
        checkpoint={"every": 10, "keep_last": 1000},
    )
    return Stage(started, {"recipe": block, "goal": GOAL, **own}, [BASE, data], per_seed=not own)


STAGES: dict[str, Stage] = {
    NEW: Stage(blank, {"seed": 0}),
    BASE: Stage(
        based,
        {
            "recipe": of_expert(
                NEW,
                BASE_STEPS,
                evaluation={"prompts": episodes(10, VALIDATION), "every": BASE_EVERY},
                checkpoint={"every": BASE_EVERY, "keep_last": 1000},
            ),
            "goal": BASE_GOAL,
            "seed": 0,
        },
        [NEW],
    ),
    NEW_TEACHER: Stage(blank, {"seed": 1, "reads": ["state"]}),
    TEACHER: Stage(
        taught,
        {
            # By the expert's distribution, as the base: one that learnt its actions alone is five nats a token away
            # from every start, and following it costs a student its success before it gains any.
            "imitate": of_expert(
                NEW_TEACHER, TEACHER_STEPS, evaluation={"prompts": episodes(10, VALIDATION), "every": 500}
            ),
            "improve": recipe(
                "",
                20,
                3e-5,
                prompts=episodes(400, TRAIN),
                objective=[{"kind": "grpo", "clip": 0.2, "clip_high": 0.28}],
                batch={"prompts": 8, "group": 8},
                evaluation={"prompts": episodes(10, VALIDATION), "every": 10},
            ),
            "seed": 0,
        },
        [NEW_TEACHER],
    ),
    DATA: Stage(demonstrated, {"of": NEW, "per_task": FEW}, [NEW], per_seed=True),
    START: _start(DATA),
    OF_RATES[DATA]: Stage(demonstrated, {"of": NEW, "per_task": FEW, "seed": SEED_OF_RATES}, [NEW]),
    OF_RATES[START]: _start(OF_RATES[DATA], seed=SEED_OF_RATES),
}
"""One base and one teacher; of each seed its own demonstrations and start."""
