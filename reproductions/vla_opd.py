"""VLA-OPD (arXiv 2603.26666): a policy that acts is corrected by an expert on its own episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.reproductions import Claim, Reproduction, Smoke, Stage
from opd.reproductions.definition import COSTS, Figures, merged
from reproductions.running_sum import figures_of
from reproductions.vla_opd_models import (
    DATA,
    FEW,
    GOAL,
    HELD_OUT,
    MANY,
    NEW,
    SEEN,
    STAGES,
    START,
    TEACHER,
    TEACHERS_DATA,
    TEST,
    TRAIN,
    VALIDATION,
    demonstrated,
    episodes,
    recipe,
    run_of,
    success,
)
from reproductions.vla_opd_premise import GATES, STAGE

STEPS, EVERY, RATE = 60, 5, 2e-4
GRPO_STEPS = 180
"""GRPO gets three times as many, since three times is what is claimed."""
PER_TASK = 20
"""Test episodes of each task."""
SHARE = 0.8
"""Of the teacher's success on validation: where the speed is measured."""
OF_SEEN = "demonstrations of seen tasks"

OPD, EXACT, FORWARD, HARD, GRPO, AFTER, EXPERTS, SFT, BEFORE, BEST = (
    "VLA-OPD",
    "exact reverse KL",
    "forward KL",
    "hard labels",
    "GRPO",
    "VLA-OPD, then GRPO",
    "expert states",
    "SFT",
    "start",
    "teacher",
)


def distilled(objective: str, **changes: Any) -> dict[str, Any]:
    """The student's episodes on the seen tasks under the teacher."""
    own = {
        "teacher": [{"kind": "policy", "model": f"{{{TEACHER}}}/run/student"}],
        "prompts": episodes(400, TRAIN, SEEN),
        "objective": [objective],
        "evaluation": {"prompts": episodes(10, VALIDATION, SEEN), "every": EVERY},
    }
    return merged(recipe(f"{{{START}}}/start", STEPS, RATE, **own), changes)


def by_success(student: str, steps: int) -> dict[str, Any]:
    """GRPO with as many episodes a step."""
    own = {
        "prompts": episodes(400, TRAIN, SEEN),
        "objective": [{"kind": "grpo", "clip": 0.2, "clip_high": 0.28}],
        "batch": {"prompts": 8, "group": 8},
        "evaluation": {"prompts": episodes(10, VALIDATION, SEEN), "every": EVERY},
    }
    return recipe(student, steps, RATE, **own)


def on_experts(objective: str, **changes: Any) -> dict[str, Any]:
    """As many states a step, those of demonstrations of the seen tasks."""
    found = distilled(objective, **changes)
    data = {"kind": "demonstrations", "path": f"{{{OF_SEEN}}}/data"}
    return {**found, "prompts": data, "rollout": {"kind": "demonstrations"}}


ARMS: dict[str, dict[str, Any]] = {
    OPD: distilled("reverse_kl_sampled"),
    EXACT: distilled("reverse_kl"),
    FORWARD: distilled("forward_kl"),
    HARD: distilled("hard_ce"),
    GRPO: by_success(f"{{{START}}}/start", GRPO_STEPS),
    EXPERTS: on_experts("reverse_kl"),
    SFT: {**on_experts("sft"), "teacher": []},
}


# -- the jobs ----------------------------------------------------------------------------------------------------------


def tested(folder: Path, model: Path, per_task: int, seed: int) -> Figures:
    """Greedy success on test states: `test_seen` and `test_held_out`."""
    return {
        f"test_{name}": success(folder / name, model, episodes(per_task, TEST, only), seed)["accuracy"]
        for name, only in (("seen", SEEN), ("held_out", HELD_OUT))
    }


def speed(curve: list[dict[str, float]], goal: float, before: float) -> dict[str, float]:
    """Logarithms to the base 3 of environment steps until held-out success reaches `goal`: the arm's own, and with the
    `before` that its teacher took by reinforcement learning. One that never gets there has those of its whole run."""
    reached = next((point for point in curve if point["step"] > 0 and point["accuracy"] >= goal), curve[-1])
    own = max(1.0, reached["simulator_steps"])
    return {"log_steps": math.log(own, 3), "log_steps_with_teacher": math.log(own + before, 3)}


def early(curve: list[dict[str, float]]) -> float:
    """The student's mean entropy on its own held-out states over the first third of training."""
    last = curve[-1]["step"]
    found = [point["student_entropy"] for point in curve if 0 < point["step"] <= max(last / 3, curve[1]["step"])]
    return sum(found) / len(found)


def measured(folder: Path, figures: Figures, inputs: Mapping[str, Path], per_task: int, seed: int) -> Figures:
    teacher = figures_of(inputs[TEACHER])
    before, curve = teacher["curve"][-1]["simulator_steps"], figures["curve"]
    return {
        **figures,
        **tested(folder / "test", folder / "run" / "student", per_task, seed),
        **speed(curve, SHARE * teacher["accuracy"], before),
        "early_entropy": early(curve),
    }


def trained(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], per_task: int, taught: bool, seed: int
) -> Figures:
    """Train an arm and test it; `taught` says whether the teacher's own training counts as its cost too."""
    figures = run_of(folder, inputs, recipe, seed)
    found = measured(folder, figures, inputs, per_task, seed)
    return found if taught else {**found, "log_steps_with_teacher": found["log_steps"]}


def untrained(folder: Path, inputs: Mapping[str, Path], *, of: str, place: str, per_task: int, seed: int) -> Figures:
    """A policy as it is, which costs nothing more."""
    return {**dict.fromkeys(COSTS, 0.0), **tested(folder / "test", inputs[of] / place, per_task, seed)}


def stage_of(name: str) -> str:
    return f"student of {name}"


def arm_stage(name: str) -> Stage:
    params = {"recipe": ARMS[name], "per_task": PER_TASK, "taught": name != GRPO}
    own = [OF_SEEN] if "demonstrations" in str(ARMS[name]["rollout"]) else []
    return Stage(trained, params, [START, TEACHER, *own], per_seed=True)


def figured(folder: Path, inputs: Mapping[str, Path], *, of: str, seed: int) -> Figures:
    """What the job of an arm's student measured."""
    return figures_of(inputs[of])


def better(
    id: str, statement: str, method: str, baseline: str, metric: str = "test_seen", margin: float = 0.0, note: str = ""
) -> Claim:
    return Claim(id, statement, metric, "higher", method, baseline, margin=margin, note=note)


ALL = (BEFORE, BEST, *ARMS, AFTER)
FEW_STEPS: dict[str, Any] = {
    "steps": 3,
    "prompts": {"per_task": 2},
    "batch": {"prompts": 4, "group": 2},
    "evaluation": {"prompts": {"per_task": 1}, "every": 1},
}
FEW_IMITATED: dict[str, Any] = {
    "steps": 3,
    "batch": {"prompts": 4},
    "evaluation": {"prompts": {"per_task": 1}, "every": 1},
}
OF_DATA = {name: {k: v for k, v in FEW_STEPS.items() if k != "prompts"} for name in (EXPERTS, SFT)}

reproduction = Reproduction(
    title="VLA-OPD",
    introduction=f"""
Does an expert that corrects a policy on its own episodes teach faster than success alone, and does the student keep
what it knew? One start per seed; every arm trains on six tasks, and four others are never trained.

**Task.** Ten tasks in pictures of 32 pixels: a block or a ball of one of five colours among two others is to be taken
and put on the grey ring; up to 40 steps with noise in the movement. The policy sees the picture, its own hand and the
instruction, and decides about four actions of three numbers at once, each one of 32 tokens.

**Models.** Policies of about 0.4 million parameters with OpenVLA-OFT's sequence. The *teacher* imitates {MANY}
demonstrations of each task and goes on by GRPO. A *start* imitates {FEW} demonstrations of each of the ten tasks, and
is the first checkpoint that succeeds in {GOAL:.0%} of episodes.

**Premise.** The start of every seed succeeds in 20 to 60 % of episodes, the teacher in 95 % or more, and the teacher
is less sure on the start's states than on its own (entropy at least 1.2 times as large). It is measured on initial
states of no test before any arm runs, and is a gate.

**Arms.** *VLA-OPD* is the paper's: the student's episodes, and at each token the teacher's log-probability less the
student's as a raw reward. *Exact reverse KL* has the whole distributions in its place, *forward KL* and *hard labels*
the other objectives, on the student's own episodes. *Expert states* is exact reverse KL on demonstrations of the six
tasks, *SFT* their imitation. *GRPO* learns from success alone, with as many episodes a step and {GRPO_STEPS // STEPS}
times as many steps. *VLA-OPD, then GRPO* goes on from the distilled weights.

**Selection.** One learning rate for all arms, {RATE:g}; nothing is chosen by a test. **Figures** are greedy success
in {PER_TASK} episodes of each task from states that nothing else began in. Speed is environment steps until
{SHARE:.0%} of the teacher's success on validation states, as logarithms to the base 3; an arm that does not get there
counts with all its steps.
""",
    discussion="",
    stages={
        **STAGES,
        "premise": STAGE,
        OF_SEEN: Stage(demonstrated, {"of": NEW, "per_task": MANY, "only": SEEN}, [NEW], per_seed=True),
        stage_of(BEFORE): Stage(
            untrained, {"of": START, "place": "start", "per_task": PER_TASK}, [START], per_seed=True
        ),
        stage_of(BEST): Stage(
            untrained, {"of": TEACHER, "place": "run/student", "per_task": PER_TASK}, [TEACHER], per_seed=True
        ),
        **{stage_of(name): arm_stage(name) for name in ARMS},
        stage_of(AFTER): Stage(
            trained,
            {"recipe": by_success(f"{{{stage_of(OPD)}}}/run/student", STEPS), "per_task": PER_TASK, "taught": True},
            [TEACHER, stage_of(OPD)],
            per_seed=True,
        ),
    },
    gates=GATES,
    arms={name: Stage(figured, {"of": stage_of(name)}, [stage_of(name)]) for name in ALL},
    seeds=(0, 1, 2, 3, 4),
    imports=["reproductions.vla_opd"],
    metrics=["test_seen", "test_held_out", "log_steps", "log_steps_with_teacher", "early_entropy"],
    claims=[
        better("main", "VLA-OPD succeeds at least 20 points more often than its start.", OPD, BEFORE, margin=0.2),
        better(
            "teacher",
            "VLA-OPD comes within 10 points of its teacher.",
            OPD,
            BEST,
            margin=-0.1,
            note="A ceiling it may miss.",
        ),
        Claim(
            "speed",
            "VLA-OPD takes a third of the environment steps of GRPO, or less.",
            "log_steps",
            "lower",
            OPD,
            GRPO,
            margin=1.0,
        ),
        Claim(
            "speed with the teacher",
            "It does so with the environment steps of its teacher's own reinforcement learning counted.",
            "log_steps_with_teacher",
            "lower",
            OPD,
            GRPO,
            margin=1.0,
        ),
        better("explosion", "Early on, forward KL has a higher entropy than VLA-OPD.", FORWARD, OPD, "early_entropy"),
        Claim(
            "collapse", "Early on, hard labels have a lower entropy than VLA-OPD.", "early_entropy", "lower", HARD, OPD
        ),
        better("forgetting", "VLA-OPD keeps more of the held-out tasks than SFT.", OPD, SFT, "test_held_out"),
        better("states", "The student's own states teach more than an expert's.", EXACT, EXPERTS),
        better("forward", "Reverse KL ends above forward KL.", OPD, FORWARD),
        better("hard", "Reverse KL ends above hard labels.", OPD, HARD),
        better("after", "GRPO behind VLA-OPD loses at most 2 points.", AFTER, OPD, margin=-0.02),
        Claim(
            "exact",
            "The sampled token teaches as much as the whole distribution.",
            "test_seen",
            "higher",
            OPD,
            EXACT,
            test="equivalent",
            margin=0.05,
        ),
        Claim(
            "scale",
            "OpenVLA-OFT from one demonstration a task gains 38 points on LIBERO.",
            testable=False,
            note="Needs a policy of seven billion parameters and its simulator.",
        ),
    ],
    headline=("main", "teacher", "speed", "speed with the teacher", "explosion", "collapse", "forgetting", "states"),
    smoke=Smoke(
        stages={
            TEACHERS_DATA: {"per_task": 2},
            TEACHER: {"imitate": FEW_IMITATED, "improve": FEW_STEPS},
            DATA: {"per_task": 1},
            START: {"recipe": {**FEW_IMITATED, "checkpoint": {"every": 1}}},
            OF_SEEN: {"per_task": 1},
            "premise": {"per_task": 1},
            **{stage_of(name): {"per_task": 1} for name in (BEFORE, BEST)},
            **{stage_of(name): {"recipe": FEW_STEPS, "per_task": 1} for name in (*ARMS, AFTER) if name not in OF_DATA},
            **{stage_of(name): {"recipe": changes, "per_task": 1} for name, changes in OF_DATA.items()},
        },
        seeds=(0,),
    ),
)
