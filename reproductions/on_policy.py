"""The field's basic claim: a student learns more from its teacher on its own states than on the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.reproductions import Claim, Gate, Reproduction, Smoke, Stage, train
from opd.reproductions.definition import Figures, merged
from reproductions.running_sum import figures_of, new_model, prompts, reached, recipe, student_tested, tested

TERMS, BUDGET = (5, 8), 96
RATES = (5e-4, 1e-3, 2e-3)
TEST = {"prompts": prompts(TERMS, 500, "test"), "max_new_tokens": BUDGET, "samples": 0, "greedy": True}
VALIDATION = {"prompts": prompts(TERMS, 256, "validation"), "max_new_tokens": BUDGET, "samples": 0, "greedy": True}
STEPS, STEPS_OF_SELECTION = 800, 400
FEW = {"prompts": {"size": 8}, "max_new_tokens": 16}
SOME = {"prompts": {"size": 64}, "batch": {"prompts": 8, "micro": 8}, "evaluation": FEW}
"""Of the smoke run: each prompt is read before the first step, and 50,000 take ten times as long as the steps."""

ARMS: dict[str, dict[str, Any]] = {
    "student prefix, reverse KL": {},
    "student prefix, forward KL": {"objective": ["forward_kl"]},
    "teacher prefix, reverse KL": {"rollout": {"kind": "teacher"}},
    "teacher prefix, forward KL": {"rollout": {"kind": "teacher"}, "objective": ["forward_kl"]},
    "SFT on teacher samples": {"rollout": {"kind": "teacher"}, "objective": ["sft"]},
}


def supervised(model: str, steps: int) -> dict[str, Any]:
    """The recipe of base and teacher: fine-tuning on reference solutions."""
    return recipe(
        model,
        TERMS,
        BUDGET,
        steps,
        3e-3,
        rollout={"kind": "data"},
        objective=["sft"],
        batch={"prompts": 64, "micro": 64},
    )


def distilled(changes: Mapping[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """An arm's recipe; its learning rate is put in when it is known."""
    own = {"evaluation": {"every": 50, **VALIDATION}, "checkpoint": {"every": 0}}
    return merged(recipe("{base}/run/student", TERMS, BUDGET, steps, 0.0, "{teacher}/run/student", **own), changes)


def at_rate(block: Mapping[str, Any], rate: float) -> dict[str, Any]:
    return merged(block, {"update": {"learning_rate": {"start": rate, "end": rate / 10}}})


def best_rate(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], rates: list[float], seed: int
) -> Figures:
    """Every rate once, with a seed that no arm has; the best by accuracy on validation prompts."""
    found = {}
    for rate in rates:
        (folder / f"{rate:g}").mkdir()
        found[rate] = train(folder / f"{rate:g}", inputs, recipe=at_rate(recipe, rate), seed=seed)["accuracy"]
    return {"rate": max(found, key=found.__getitem__), **{f"accuracy at {rate:g}": a for rate, a in found.items()}}


def arm(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    test: Mapping[str, Any],
    rate_from: str,
    seed: int,
) -> Figures:
    """Distil at the arm's best rate and test; cost to 90 % of the teacher's accuracy comes from validation."""
    inputs = dict(inputs)
    rate = figures_of(inputs.pop(rate_from))["rate"]
    teacher = figures_of(inputs.pop("teacher on validation"))
    figures = student_tested(folder, inputs, recipe=at_rate(recipe, rate), test=test, seed=seed, states=True)
    greedy = reached(figures["curve"], "greedy_accuracy", 0.9 * teacher["test_greedy_accuracy"])
    sampled = reached(figures["curve"], "accuracy", 0.9 * teacher["test_accuracy"])
    return {**figures, **greedy, **{f"{name}_sampled": value for name, value in sampled.items()}, "rate": rate}


def rate_stage(name: str) -> str:
    return f"rate of {name}"


reproduction = Reproduction(
    title="On-policy distillation",
    introduction=f"""
Does a student learn more on states that it visits itself than on its teacher's? The same two models, the same
{STEPS} steps of 32 trajectories, and who writes the trajectories and which loss is taken are the only differences.

**Task.** Running sums modulo 10 of {TERMS[0]} to {TERMS[1]} digits, written step by step; every step has three legal
writings, so the teacher's distribution has several modes.

**Models.** Both are Llamas of 2 layers and width 64 with one past: the base learnt from 1,200 batches of 64 reference
solutions, and the teacher is that base after 2,000 more.

**Selection.** Each arm takes the best of the learning rates {", ".join(f"{r:g}" for r in RATES)} by accuracy on
validation prompts, in runs of {STEPS_OF_SELECTION} steps under a seed of their own; figures are from 500 test prompts,
sampled at temperature 1, and greedy.

**Cost to 90 %** is what training had taken when the greedy accuracy on 256 validation prompts first reached 90 % of
the teacher's greedy accuracy on the same prompts (the whole run's cost where it never did); the columns that end in
`sampled` say the same of answers sampled at temperature 1, which is harder: one improbable step spoils an answer.

**Exposure** is the mean forward KL to the teacher over the last quarter of the student's own trajectories, less the
same over the teacher's trajectories: what imitating on others' states leaves undone on one's own.
""",
    discussion="""
## Why it came out so

**No effect of who writes the prefix is found at temperature 1.** Neither direction of the KL gains what five seeds
could tell from nothing when the student writes instead of the teacher, and no difference of exposure is found.

A likely reason: a wrong step of a running sum leads to a state that the teacher's texts hold too (its next steps add to
another digit), so that the states of teacher and student are much alike. A task whose errors lead out of the teacher's
states would test the claim harder.

With reverse KL, greedy answers come out ahead on the student's states, on every seed, and only there does reverse KL
reach the goal within the budget (four seeds of five). That claim is reproduced by itself; it was written after an
earlier grid and is no headline claim.

**A teacher's whole distribution beats its samples.** All four students of a KL get more right than supervised
fine-tuning on as many samples of the same teacher. Only reverse KL on the student's own states is held against it by a
claim, which is reproduced.

**The directions differ in what they cost.** The earlier grid of 200 steps had reverse KL far ahead at temperature 1.
With four times the steps and a rate of 2e-3, forward KL is about level there (0.74 and 0.75 against 0.76 and 0.74) and
ahead in greedy answers (0.93 against 0.91 and 0.87); on either prefix it takes the fewest tokens to 90 % of the
teacher's greedy accuracy.

So "who is ahead" was a matter of the budget. No claim is about the directions.

**Cost to 90 % of the teacher.** For greedy answers all arms but one reached it in most seeds (`reached`). Between
reverse KL on the student's states and supervised fine-tuning no difference of tokens or seconds is found, and more
seeds of such a spread would not soon find one.

At temperature 1 nobody reached it: the best arm is at 0.76 and the goal is 0.83. Those columns (`... to goal sampled`)
therefore hold the cost of the whole run, which says no more than that the student's own answers are longer than the
teacher's, and no claim is made of them.

**Curves.** Evaluations were watched at 17 points of each run, but their metrics were not kept: results held points only
under the names of test metrics.

**What was chosen after looking.**

- The headline claims: what on-policy distillation is commonly said to bring (more right, on either direction; better
  than fine-tuning, and sooner; less exposure bias; the more, the longer the task). The rest is in the appendix.
- The number of steps: the earlier grid fixed it (nobody had reached the goal after 200), and a run of one seed fixed it
  at 800. The greedy goal was put beside the sampled one then.

**Rates** were selected in shorter runs than those reported; forward KL and fine-tuning took the upper end of the grid,
where more might be had. Other work shared the cores, so CPU seconds compare the arms with each other only.
""",
    stages={
        "new": Stage(new_model, {"width": 64, "layers": 2, "heads": 4, "seed": 0}),
        "base": Stage(train, {"recipe": supervised("{new}/model", 1200), "seed": 0}, ["new"]),
        "teacher": Stage(train, {"recipe": supervised("{base}/run/student", 2000), "seed": 1}, ["base"]),
        "teacher on validation": Stage(
            tested, {"student": "{teacher}/run/student", "test": VALIDATION, "seed": 0}, ["teacher"]
        ),
        **{
            rate_stage(name): Stage(
                best_rate,
                {"recipe": distilled(changes, STEPS_OF_SELECTION), "rates": list(RATES), "seed": 100},
                ["base", "teacher"],
            )
            for name, changes in ARMS.items()
        },
    },
    gates=[
        Gate("teacher", "accuracy", at_least=0.9),
        Gate("base", "accuracy", at_least=0.2),
        Gate("base", "accuracy", at_most=0.7),
    ],
    arms={
        name: Stage(
            arm,
            {"recipe": distilled(changes), "test": TEST, "rate_from": rate_stage(name)},
            ["base", "teacher", "teacher on validation", rate_stage(name)],
        )
        for name, changes in ARMS.items()
    },
    seeds=(0, 1, 2, 3, 4),
    metrics=[
        "test_accuracy",
        "test_greedy_accuracy",
        "test_reverse_kl",
        "test_forward_kl",
        "reached",
        "sampled_tokens_to_goal",
        "cpu_seconds_to_goal",
        "reached_sampled",
        "sampled_tokens_to_goal_sampled",
        "cpu_seconds_to_goal_sampled",
        "exposure",
        *(f"{side}_q{i}" for side in ("own", "teacher") for i in (1, 2, 3, 4)),
        "rate",
    ],
    claims=[
        Claim(
            "main",
            "On its own states the student gets more test problems right than on the teacher's (reverse KL).",
            "test_accuracy",
            "higher",
            "student prefix, reverse KL",
            "teacher prefix, reverse KL",
        ),
        Claim(
            "forward",
            "On its own states the student gets more test problems right than on the teacher's (forward KL).",
            "test_accuracy",
            "higher",
            "student prefix, forward KL",
            "teacher prefix, forward KL",
        ),
        Claim(
            "sft",
            "On-policy distillation beats supervised fine-tuning on the teacher's samples.",
            "test_accuracy",
            "higher",
            "student prefix, reverse KL",
            "SFT on teacher samples",
        ),
        Claim(
            "tokens",
            "On-policy distillation reaches 90 % of the teacher's greedy accuracy with fewer sampled tokens than "
            "supervised fine-tuning.",
            "sampled_tokens_to_goal",
            "lower",
            "student prefix, reverse KL",
            "SFT on teacher samples",
        ),
        Claim(
            "seconds",
            "It reaches that accuracy in fewer CPU seconds than supervised fine-tuning.",
            "cpu_seconds_to_goal",
            "lower",
            "student prefix, reverse KL",
            "SFT on teacher samples",
        ),
        Claim(
            "prefix tokens",
            "Reverse KL reaches 90 % of the teacher's greedy accuracy with fewer sampled tokens on the student's "
            "states than on the teacher's.",
            "sampled_tokens_to_goal",
            "lower",
            "student prefix, reverse KL",
            "teacher prefix, reverse KL",
            note="On the teacher's states no seed reached it, and on the student's one did not; the cost is then that "
            "of the whole run.",
        ),
        Claim(
            "exposure",
            "Late in a trajectory forward KL on the student's states is left with less exposure bias than on the "
            "teacher's.",
            "exposure",
            "lower",
            "student prefix, forward KL",
            "teacher prefix, forward KL",
        ),
        Claim(
            "greedy",
            "Greedy answers are right more often after reverse KL on the student's states than on the teacher's.",
            "test_greedy_accuracy",
            "higher",
            "student prefix, reverse KL",
            "teacher prefix, reverse KL",
            note="Written after a first grid of 200 steps had been seen; these runs test it anew.",
        ),
        Claim(
            "scale",
            "The advantage grows with the length of the task and the gap between the models.",
            testable=False,
            note="One length and one pair of models are trained here.",
        ),
    ],
    headline=("main", "forward", "sft", "tokens", "seconds", "exposure", "scale"),
    smoke=Smoke(
        stages={
            "base": {"recipe": {"steps": 8, **SOME}},
            "teacher": {"recipe": {"steps": 12, **SOME}},
            "teacher on validation": {"test": FEW},
            **{rate_stage(name): {"recipe": {"steps": 2, **SOME}, "rates": [1e-3]} for name in ARMS},
        },
        arms={"recipe": {"steps": 2, **SOME, "evaluation": {"every": 2, **FEW}}, "test": FEW},
        seeds=(0,),
    ),
)
