"""Flow-OPD (arXiv 2605.08063): one reinforced expert a reward, and one student that learns from all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.drawings.vocabulary import drawing_tokenizer
from opd.flow.creation import create_flow_model
from opd.merging import merge
from opd.prompts.drawings import DrawingPrompts
from opd.reproductions import Gate, Reproduction, Smoke, Stage, train
from opd.reproductions.definition import COSTS, Figures, merged
from reproductions.drawn import (
    PIXELS,
    TASKS,
    abilities,
    drawings,
    drawn,
    experts_drawn,
    figures_of,
    gradients,
    make_judges,
    measured,
    samples_of_experts,
)
from reproductions.flow_opd_claims import CLAIMS, EXPERTS, HEADLINE, LONG, MAIN, MERGE, MIX_ARM, PLAIN, QUALITY
from reproductions.on_policy import at_rate, best_rate

T, NOISE, ODE_STEPS = 6, 0.7, 20
BASE_STEPS, BASE_ROUNDS, STEPS = 1000, 12, 100
BATCH = {"prompts": 8, "group": 16, "micro": 64}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
EXPERT_STEPS = {"count": 300, "glyph": 200, "quality": 250}
EXPERT_RATES = {"count": 1e-3, "glyph": 3e-4, "quality": 3e-4}
WARMUP = 20
"""Adam's first steps are of full size whatever they are worth, and of a reward's gradient they are mostly noise."""
SFT_STEPS, SFT_PICTURES = 400, 1000
HELD_OUT, DRAWS, GRADIENT_BATCHES = 300, 32, 16
NUMBERS = 3 * PIXELS**2
"""Pictures of each expert for the SFT start; test prompts of each set, pictures a text for the row on surpassing; steps
whose gradients are averaged."""
ENOUGH, WINDOW = 0.3, (0.25, 0.9)
"""Share of right pictures of each number and of glyph at which the base stops learning, and between which it must draw
them."""

ROUTES = {"count": EXPERTS["count"], "glyph": EXPERTS["glyph"], "scene": EXPERTS["quality"]}
"""Expert of each prompt set; that of quality is the anchor too."""
MIX = [drawings("count", 3000), drawings("glyph", 1000), drawings("scene", 1000)]
LEARNT = [drawings("count", 12000), drawings("glyph", 6000), drawings("scene", 3000)]
"""With their pictures, what the base learns from and the judges know. Numbers are the last thing that it learns."""
MIXED_REWARD = {"count": 0.8, "glyph": 0.8, "quality": 0.2}
"""Of count and glyph mostly the task; of scene quality alone."""


def of(stage: str) -> str:
    return f"{{{stage}}}/run/student"


def student(name: str) -> str:
    return f"student: {name}"


def validation(size: int) -> list[dict[str, Any]]:
    """Blocks of `size` prompts a task. A model knows a prompt of count by its text, and all splits but `unseen` have
    the same texts; that of training has them evenly."""
    return [drawings("count", size, "train", 1), *(drawings(task, size, "validation") for task in TASKS[1:])]


# -- the recipes -------------------------------------------------------------------------------------------------------


def recipe(
    model: str, steps: int, sets: Sequence[Any] = MIX, reward: Mapping[str, float] = MIXED_REWARD, **changes: Any
) -> dict[str, Any]:
    base = {
        "steps": steps,
        "student": {"kind": "flow_transformer", "model": model},
        "teacher": [],
        "prompts": list(sets),
        "verifier": {"kind": "drawing", "reward": dict(reward)},
        "rollout": {"kind": "sde", "steps": T, "noise": NOISE},
        "reduction": "sequence_sum",
        "update": {"learning_rate": {"kind": "cosine", "start": 0.0, "end": 0.0, "warmup": WARMUP}},
        "batch": BATCH,
        "evaluation": {
            "prompts": validation(100),
            "steps": ODE_STEPS,
            "every": 50,
            "samples": 0,
        },
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    return merged(base, changes)


def matching(model: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """Flow matching: one latent of each image, at a random time."""
    block = recipe(
        model,
        steps,
        reward={"task": 1.0},
        verifier={"graded": False},
        rollout={"kind": "noised"},
        objective=["sft"],
        batch={"prompts": 64, "group": 1},
        evaluation={"every": 400},
    )
    return merged(at_rate(block, rate), changes)


def grpo(
    start: str, steps: int = STEPS, sets: Sequence[Any] = MIX, reward: Mapping[str, float] = MIXED_REWARD
) -> dict[str, Any]:
    """Policy gradient of a reward, and the KL to the base."""
    return recipe(
        of(start),
        steps,
        sets,
        reward,
        teacher=[{"kind": "flow", "name": "base", "model": of("base"), "batch": 64}],
        objective=[
            {"kind": "grpo", "spread": "batch", "bound": 5.0, "clip": 1e-4},
            # The released weight multiplies the divergence times delta; without that the base would hold seven times
            # harder.
            {"kind": "gaussian_kl", "weight": 0.04, "scale": "release", "teacher": "base"},
        ],
    )


def distilled(
    start: str, anchor: str | None = None, weight: float = 0.0, estimator: str = "kl_direct", **changes: Any
) -> dict[str, Any]:
    """The divergence from the routed experts, and beside it that from the anchor."""
    routes = {task: {"kind": "flow", "model": of(stage), "batch": 64} for task, stage in ROUTES.items()}
    teachers: list[dict[str, Any]] = [{"kind": "routed", "name": "experts", "by": "task", "routes": routes}]
    objectives: list[dict[str, Any]] = [{"kind": "gaussian_kl", "teacher": "experts", "estimator": estimator}]
    if anchor is not None:
        teachers.append({"kind": "flow", "name": "anchor", "model": of(anchor), "batch": 64})
        objectives.append({"kind": "gaussian_kl", "teacher": "anchor", "weight": weight})
    return merged(recipe(of(start), STEPS, teacher=teachers, objective=objectives, evaluation={"every": 25}), changes)


def different_texts(block: Mapping[str, Any]) -> int:
    return len({row["prompt"] for _, row in DrawingPrompts(**block).rows()})


SETS = [
    drawings("count", HELD_OUT, "train", 5),
    *(drawings(task, HELD_OUT, "test") for task in TASKS[1:]),
    drawings("count", HELD_OUT, "unseen"),
]
DIFFERENT = dict(zip((*TASKS, "unseen"), map(different_texts, SETS), strict=True))
DISTINCT = ", ".join(f"{number} of {name}" for name, number in DIFFERENT.items())
TEXTS = DIFFERENT["count"] + DIFFERENT["glyph"]
TEST = merged(distilled("base"), {"evaluation": {"prompts": SETS}})
"""What every model is tested by; the test puts its own model in the student's place."""

# -- the stages --------------------------------------------------------------------------------------------------------


def new_model(folder: Path, inputs: Mapping[str, Path], *, width: int, heads: int, layers: int, seed: int) -> Figures:
    """A transformer with random weights and a prompt table of the drawings' words, in `folder/run/student`."""
    sizes = {"size": PIXELS, "patch": 4, "layers": layers, "heads": heads, "head_width": width // heads}
    create_flow_model(folder / "run" / "student", drawing_tokenizer(*TASKS), places=4, seed=seed, **sizes)
    return {}


def early_stopped(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], rounds: int, enough: float, seed: int
) -> Figures:
    """Flow matching in rounds, each from where the last one ended, until glyph and every single number of count are
    right in `enough` of the recipe's held-out prompts; a task that is there keeps a twelfth of its prompts. The last
    round's student lies in `folder/run/student`; costs and curve are of all rounds."""
    block, before, curve = dict(recipe), inputs["new"], []
    spent = dict.fromkeys((*COSTS, "step"), 0.0)
    for number in range(rounds):
        place = folder / f"round-{number}"
        place.mkdir()
        figures = train(place, {"new": before}, recipe=block, seed=seed + number)
        can = abilities(drawn(recipe, {"round": place}, of("round"), seed))
        points = [{**point, **{name: point[name] + spent[name] for name in spent}} for point in figures["curve"]]
        curve += [*points[:-1], {**points[-1], **can}]
        spent, before = {name: curve[-1][name] for name in spent}, place
        there = {"count": min(can["by_number"].values()) >= enough, "glyph": can["glyph"] >= enough, "scene": False}
        if there["count"] and there["glyph"]:
            break
        sets = zip(recipe["prompts"], TASKS, strict=True)
        block["prompts"] = [{**of_task, "size": of_task["size"] // (12 if there[t] else 1)} for of_task, t in sets]
    shutil.copytree(before / "run" / "student", folder / "run" / "student")
    return {**figures, **can, **{name: spent[name] for name in COSTS}, "curve": curve}


def merged_experts(folder: Path, inputs: Mapping[str, Path]) -> Figures:
    """The experts' average, in `folder/run/student`."""
    merge([place / "run" for place in inputs.values()], folder / "run" / "student")
    return {"cpu_seconds": 0.0}


def trained(folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], rate: str, seed: int) -> Figures:
    """Train at the rate that the stage `rate` chose."""
    block = at_rate(recipe, figures_of(inputs[rate])["rate"])
    return train(folder, {name: place for name, place in inputs.items() if name != rate}, recipe=block, seed=seed)


def skills(folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], seed: int) -> Figures:
    """`count`, `glyph` and `quality` of the base on validation prompts, and by how much each expert is better at its
    own."""
    found = {name: abilities(drawn(recipe, inputs, of(name), seed)) for name in ("base", *EXPERTS.values())}
    gains = {f"{task}_gain": found[stage][task] - found["base"][task] for task, stage in EXPERTS.items()}
    return found["base"] | gains


# -- the arms ----------------------------------------------------------------------------------------------------------

REINFORCED = {
    "GRPO, 1 reward": grpo("base", sets=MIX[:1], reward={"count": 1.0}),
    "GRPO, 2 rewards": grpo("base", sets=MIX[:2], reward={"task": 1.0}),
    MIX_ARM: grpo("base"),
    "GRPO-Mix from merge": grpo("merged"),
}
SEEDS = (0, 1, 2)
LONG_STEPS = STEPS + sum(EXPERT_STEPS.values())
"""As many samples as a student and all of its experts."""
DISTILLED = {
    MAIN: distilled("merged", QUALITY, 0.02),
    PLAIN: distilled("merged"),
    "OPD, anchor 0.08": distilled("merged", QUALITY, 0.08),
    "OPD, anchor is the base": distilled("merged", "base", 0.02),
    "OPD from SFT": distilled("SFT"),
    "OPD from base": distilled("base"),
    "OPD, pg_sample": distilled("merged", estimator="pg_sample"),
    "OPD, pg_detached": distilled("merged", estimator="pg_detached"),
    "OPD on experts' rollouts": distilled("merged", rollout={"teacher": "experts"}),
    "OPD from base on experts' rollouts": distilled("base", rollout={"teacher": "experts"}),
    "OPD on noised data": distilled("merged", rollout={"kind": "noised", "times": "grid"}),
}


def inputs_of(block: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """The stages that a recipe's texts name."""
    text = json.dumps(block)
    return [name for name in known if f"{{{name}}}" in text]


MODELS = ["base", *EXPERTS.values(), "merged", "SFT"]
RATE = {"GRPO": "rate of GRPO", "OPD": "rate of OPD"} | dict.fromkeys(
    ("OPD, pg_sample", "OPD, pg_detached"), "rate of pg_sample"
)
ESTIMATORS = ("kl_direct", "pg_sample", "pg_detached")


def trained_stage(block: Mapping[str, Any], rate: str) -> Stage:
    return Stage(trained, {"recipe": block, "rate": rate}, [rate, *inputs_of(block, MODELS)], per_seed=True)


STARTS = (PLAIN, "OPD from SFT", "OPD from base")
GOAL = [student(STARTS[-1]), student(PLAIN)]
"""From where the one begins to where the other ends; nine tenths of that way is a goal for all starts."""


def arm(
    stage: str, training: bool = True, experts: bool = True, draws: bool = False, goal: bool = False, spent: int = 0
) -> Stage:
    """A test of the student that a stage made, `training` this seed's arm or a model that was there before."""
    params: dict[str, Any] = {"model": of(stage), "recipe": TEST}
    params |= {"trained": stage} if training else {}
    params |= {"experts": list(EXPERTS.values())} if experts else {}
    params |= {"draws": DRAWS} if draws else {}
    params |= {"way": GOAL, "spent": spent} if goal else {}
    needed = [
        "judges",
        "base",
        *EXPERTS.values(),
        stage,
        *(["experts drawn"] if draws else []),
        *(GOAL if goal else []),
    ]
    return Stage(measured, params, list(dict.fromkeys(needed)))


EXPERT_SETS = {
    "count": {"sets": MIX[:1], "reward": {"count": 1.0}},
    "glyph": {"sets": MIX[1:2], "reward": {"glyph": 1.0}},
    "quality": {"reward": {"task": 0.2, "quality": 0.8}},
}
OF_EXPERTS = {task: of(stage) for task, stage in ROUTES.items()}
VALIDATION = merged(TEST, {"evaluation": {"prompts": validation(300)}})
STAGES = {
    "new": Stage(new_model, {"width": 72, "heads": 3, "layers": 3, "seed": 0}),
    "base": Stage(
        early_stopped,
        {
            "recipe": matching(
                of("new"),
                BASE_STEPS,
                2e-3,
                student={"train_prompts": True},
                prompts=LEARNT,
                evaluation={"prompts": validation(300), "every": 0},
            ),
            "rounds": BASE_ROUNDS,
            "enough": ENOUGH,
            "seed": 0,
        },
        ["new"],
    ),
    "judges": Stage(make_judges, {"prompts": LEARNT, "steps": 300, "seed": 7}),
    "rate of GRPO": Stage(best_rate, {"recipe": grpo("base"), "rates": list(RATES), "seed": 100}, ["base"]),
    **{
        stage: Stage(
            train,
            {
                "recipe": at_rate(grpo("base", EXPERT_STEPS[task], **EXPERT_SETS[task]), EXPERT_RATES[task]),
                "seed": 1 + i,
            },
            ["base"],
        )
        for i, (task, stage) in enumerate(EXPERTS.items())
    },
    "skills": Stage(skills, {"recipe": VALIDATION, "seed": 0}, ["base", *EXPERTS.values()]),
    "merged": Stage(merged_experts, {}, list(EXPERTS.values())),
    **{
        stage: Stage(
            best_rate,
            {"recipe": distilled("merged", estimator=estimator), "rates": list(RATES), "seed": 100},
            ["merged", *EXPERTS.values()],
        )
        for stage, estimator in (("rate of OPD", "kl_direct"), ("rate of pg_sample", "pg_sample"))
    },
    "samples": Stage(
        samples_of_experts,
        {"models": OF_EXPERTS, "recipe": TEST, "size": SFT_PICTURES, "seed": 3},
        ["base", *EXPERTS.values()],
    ),
    "SFT": Stage(
        train,
        {
            "recipe": matching(
                of("base"),
                SFT_STEPS,
                5e-4,
                rollout={"author": "teacher"},
                prompts=[{"kind": "file", "path": "{samples}/rows.jsonl"}],
            )
        },
        ["base", "samples"],
        per_seed=True,
    ),
    "experts drawn": Stage(
        experts_drawn,
        {"models": {stage: of(stage) for stage in EXPERTS.values()}, "recipe": TEST, "draws": DRAWS, "seed": 11},
        ["base", *EXPERTS.values()],
    ),
}
TRAINED = {
    **{student(name): trained_stage(block, RATE["GRPO"]) for name, block in REINFORCED.items()},
    **{student(name): trained_stage(block, RATE.get(name, RATE["OPD"])) for name, block in DISTILLED.items()},
    student(LONG): trained_stage(grpo("base", LONG_STEPS), RATE["GRPO"]),
}


FEW = [{**block, "size": 4} for block in SETS]
"""Of count that is one of each number."""
SMALL_SETS = [drawings(task, 24) for task in TASKS]
SMALL = {
    "steps": 2,
    "prompts": SMALL_SETS,
    "batch": {"prompts": 2, "group": 2},
    "evaluation": {"prompts": [drawings(task, 2, "validation") for task in TASKS[:2]], "steps": 2, "every": 0},
    "update": {"learning_rate": {"warmup": 0}},
}
SMALL_TEST = merged(SMALL, {"evaluation": {"prompts": FEW}})

reproduction = Reproduction(
    title="Flow-OPD",
    introduction=f"""
Several rewards for one image model: reinforce it on their mixture, or reinforce one expert a reward and distil all of
them into one student, on latents that the student samples itself? Every arm of GRPO or OPD but
`{LONG}` sees {STEPS} steps of {BATCH["prompts"]} prompts with {BATCH["group"]} samples each, so that
student samples are equal.

**Task.** [Drawings](../images.md) of {PIXELS} x {PIXELS} pixels: objects to count, each filling the middle of a
quarter, two of twelve characters to write in the middle, a shape in front of a gradient, and a quality that says
nothing of the prompt. Training rewards are graded. Test pictures come from {ODE_STEPS} steps of the ODE.

- `count`, `glyph` and `scene` are the shares of pictures that are right in all, of {HELD_OUT} test prompts each.
- `count 1` to `count 4` are count by the number that was asked for.
- `quality` is a mean over all of these prompts.
- `mean` is that of count, glyph and quality.
- `unseen` is count on triples of number, colour and shape that nobody trained on.

Prompts repeat: there are {DISTINCT} different ones. Equal ones are bundled, those of `unseen` by themselves and the
others in as many bundles as the fewest of them; figures are means over bundles. Prompts of count, which a model knows
by their text, are the same in training and test, but for `unseen`.

**Models** are SD3 transformers on pixels of patch 4, width 72 and 3 layers (0.56 million parameters) without guidance.
The **base** learnt by flow matching in rounds of {BASE_STEPS} batches and stopped as soon as glyph and every single
number of count are right in {ENOUGH:.0%} of the cases; glyph and count as a whole must then be below {WINDOW[1]:.0%},
so that there is something left to learn.

**Experts** are that base after GRPO: {EXPERT_STEPS["count"]} steps on count at rate {EXPERT_RATES["count"]:g},
{EXPERT_STEPS["glyph"]} on glyph at {EXPERT_RATES["glyph"]:g}, and {EXPERT_STEPS["quality"]} on 0.8 quality and 0.2
task over all prompts at {EXPERT_RATES["quality"]:g}; the last owns the prompts of scene and is the anchor. All arms
share them.

**GRPO-Mix** draws the prompt sets 3:1:1 and rewards count and glyph with 0.8 task and 0.2 quality, scene with quality.

**Cold starts** are the experts' average and flow matching on their pictures. Sampling in training: {T} steps, the last
one not trained on, noise {NOISE}. The learning rates of GRPO, of OPD and of OPD by pg_sample are each the best of
{", ".join(f"{r:g}" for r in RATES)} by their own held-out mixed reward, under a seed of its own.

**Costs** are CPU seconds of one thread; `expert cpu seconds` is what the experts took that an arm leans on, selection
of the rate left out.

**kl** is the mean divergence from the routed experts along a model's own SDE, `kl step K` that of one step,
`kl experts` the mean along the experts'.

**along** compares gradients at the experts' average: that of `kl_direct`, the mean over {GRADIENT_BATCHES} steps'
samples, with another mean over as many others, of each estimator. It is their inner product over the squared length of
the first.

**Judges** that no reward knows: `entropy` of backgrounds that no prompt names, `sharpness` of edges, `novelty`, the
distance to the nearest training picture, and the `frechet` distance to references of the same prompts.

**wins** counts, of {TEXTS} texts of count and glyph with {DRAWS} pictures each, those on which a model is right more
often than every expert (Fisher's exact test, false discovery rate 5 %).

**accuracy** is what training reached of its own reward on validation prompts.

**reached** and **sampled tokens to goal** (denoising steps) are of the three starts of OPD without anchor. The goal is
nine tenths of the way, in that accuracy, from where the one from the base begins to where the one from the average
ends, under the same seed.

**Size.** A step of GRPO or OPD took 0.8 CPU seconds of one thread, an arm a minute and a half, and `{LONG}`, which has
{LONG_STEPS / STEPS:.1f} times the steps, thirteen minutes. All of it took 110 minutes of two cores, on which other work
ran beside it.
""",
    discussion=f"""
## What the figures say

**The student.** With equal samples of its own OPD is twelve points above GRPO on the mixture, ten of them in glyph. By
itself that is told from nothing (0.03 to 0.22); among the headline claims together three seeds do not decide it.

Ten of the twelve are the experts' average, before any step of OPD, and the expert of glyph alone has as much (0.744).
What OPD adds to the average (0.021) has an interval with zero in it: it raises glyph from 0.86 to 0.95, lowers quality
from 0.685 to 0.663, blurs edges (sharpness 0.83 against 0.89), and no change of count is found.

The student leans on 7.5 times its own samples, which the experts took. GRPO with as many in all ends 0.014 higher, with
zero in the interval, at about the same CPU seconds (759 against 95 and 619 of the experts, trials of settings left
out), and passes the student's reward on validation after three quarters of them. So nothing is saved here.

That GRPO is higher in quality (0.70) and lower on scene (0.09 against 0.14), for which it is paid by quality alone.

From the average GRPO makes nothing better (0.727), which is what OPD is held against in that row.

**Flow matching on the experts' pictures**, the other way to learn from them, ends six points below OPD, which gains as
much from there: count is 0.2 higher, quality 0.02 lower, glyph no different. Its rate was not tuned, and it counts
worse than the base that it began from (0.47 against 0.55).

**Experts.** That OPD comes within three points of those of count and glyph is undecided: intervals over three seeds are
wide, and for glyph the estimate itself (0.028 below) is at the margin. Of the expert of quality it comes within three
points where it hears it, on scene, and over all prompts it does not: it is 0.095 below.

On none of {TEXTS} texts does it win against all experts. Glyph has no room for that, and 32 pictures show large gains
alone.

**Tuning was not even.** Each expert got steps, a rate and, for quality, a reward of its own, chosen in trials from
another base (the third that was tried; 0.6 task and 0.4 quality had gained 0.006 at most). GRPO-Mix got the best of
four rates for {STEPS} steps, also for its long arm and from the average. Experts were trained once, so rows about them
hold the luck of one training.

**The seesaw** is not seen as rewards are added to a mixture, with intervals of seven points and more, in which it could
not be. It is between experts: that of count writes worse than the base (0.23 against 0.34, one training).

**Starts.** The three end within 0.6 points. Between the average and the base no difference of the samples to the goal
is found. The SFT start is beyond the goal before OPD begins: its 60,000 are all pictures, twice what the others take,
so that it is slower by design and no claim is made of that.

**The anchor** raises quality, which its expert was rewarded for, by 0.002 at the paper's weight and by 0.009 at four
times that. No judge is found to improve, and by the most telling one pictures could not: the anchor's own pictures are
farther from the references than the student's (Frechet 97 against 29) and less various.

In the paper the anchor is better than the base by most judges, which is not so here; so this row says little of the
method.

**Distance and variety.** On average all are farther from the references than the base (7): GRPO on one or two rewards
11 and 9, GRPO-Mix and the average 28, OPD 29, GRPO with all samples 49. Backgrounds lose variety (entropy 1.91 at the
base; 1.43, 1.46 and 1.59 for GRPO-Mix, OPD and GRPO with all samples).

**Estimators.** In training, each at its best rate (1e-3 and 1e-4, the lowest that was tried), `kl_direct` comes six
times nearer to the experts than `pg_sample`, which ends where it began in divergence and three points lower in the
mean, with zero in the interval. `pg_detached` drifts away at that rate.

Where training begins the gradient of `pg_sample` goes 1.33, 0.72 and 0.61 of the way that the divergence's goes, under
three seeds of {GRADIENT_BATCHES} steps, and that of `kl_direct` 1.04 to 1.10.

That of `pg_detached` is defined by a mean where `pg_sample` has the sum over a latent's {NUMBERS} numbers. So its 0.000
shows little, and no claim is made of it; times {NUMBERS} it is 0.29, -0.35 and -0.36, zero as far as that noise shows.
What is left of `pg_sample` without that is 1.04, 1.06 and 0.96: it carries the noise of `pg_detached` beside the right
gradient.

**States.** From the average no difference was found between latents of the student and of the experts, the paper's main
ground for being on-policy. From the base the student's own are ahead by 0.009, with zero just within the interval, and
not in divergence. Before training the two kinds of states differ (`kl` from the base 0.070 along its own and 0.053
along the experts'), after it a student is as near along either.

Noised data end 0.007 lower in the mean, with zero in the interval. They leave the divergence half as large again, and
quality 0.008 lower, both without.

**What was chosen after looking.** The headline claims: what the paper leads with (one student above the mixture and as
good as each expert, the anchor, the scale), the control with equal samples in all, and what this library is about, that
the student's own states teach more. The rest is in the appendix.

## Where it differs from the paper

- **Models** are trained whole and not by LoRA, without guidance and without a mean over weights, on {PIXELS} pixels,
  with T = {T}, in {STEPS} steps of {BATCH["prompts"] * BATCH["group"]} samples.
- **Updates.** A batch is used for one update, so ratios are one and clips idle; the release takes two.
- **GRPO-Mix** mixes the sets within a batch and divides by the spread of all their rewards, where the release draws one
  set an epoch. Its KL, also from the average, is to the base, and weighs 0.04 for every reward, where the release has
  0.01 for preferences.
- **The expert of quality**, paid for the task of scene a little, has prompts of its own beside being the anchor.
- **Rates.** Each method has one rate for all its arms: that of GRPO is tuned on GRPO-Mix from the base, that of OPD on
  `{PLAIN}`, from the average, so that other starts and prefixes may have better ones.
- **Seeds** vary training and test noise; experts, base and judges are made once.
- **Samples** of students are equal, but an arm of OPD also leans on the experts' samples: `{LONG}` has
  {LONG_STEPS / STEPS:.1f} times the steps, all that a student and its experts take together. What an SFT start takes,
  {SFT_STEPS} steps on {3 * SFT_PICTURES:,} pictures of the experts, is not counted among its samples.
- **Settings.** The experts' steps and rates, the warm-up of {WARMUP}, the batch and the {T} steps of sampling were
  chosen in trials of the experts alone: with others GRPO hardly learnt to count.
""",
    stages={**STAGES, **TRAINED},
    gates=[
        *(
            Gate("base", task, **limit)
            for task in ("count", "glyph")
            for limit in ({"at_least": WINDOW[0]}, {"at_most": WINDOW[1]})
        ),
        Gate("base", "by_number", at_least=WINDOW[0], worst=True),
        Gate("skills", "count_gain", at_least=0.05),
        Gate("skills", "glyph_gain", at_least=0.05),
        Gate("skills", "quality_gain", at_least=0.01),
    ],
    arms={
        "base": arm("base", training=False, experts=False),
        **{stage: arm(stage, experts=False) for stage in EXPERTS.values()},
        MERGE: arm("merged", training=False, draws=True),
        "SFT only": arm("SFT"),
        **{name: arm(student(name), experts=name == "GRPO-Mix from merge") for name in REINFORCED},
        LONG: arm(student(LONG), experts=False),
        **{
            name: arm(
                student(name),
                draws=name == MAIN,
                goal=name in STARTS,
                spent=3 * SFT_PICTURES * ODE_STEPS if name == "OPD from SFT" else 0,
            )
            for name in DISTILLED
        },
        **{
            f"gradient of {estimator}": Stage(
                gradients,
                {"recipe": distilled("merged", estimator=estimator), "batches": GRADIENT_BATCHES},
                ["merged", *EXPERTS.values()],
            )
            for estimator in ESTIMATORS
        },
    },
    seeds=SEEDS,
    imports=("diffusers.models.auto_model", "diffusers.models.transformers.transformer_sd3", "scipy.stats"),
    metrics=[
        "count",
        "glyph",
        "quality",
        "mean",
        "scene",
        "unseen",
        *(f"count_{number}" for number in (1, 2, 3, 4)),
        "scene_quality",
        "kl",
        "log_kl",
        "kl_experts",
        "log_kl_experts",
        "along",
        "expert_cpu_seconds",
        "entropy",
        "sharpness",
        "novelty",
        "frechet",
        "wins",
        "reached",
        "sampled_tokens_to_goal",
        *(f"kl_step_{k}" for k in range(int(0.99 * T))),
        "accuracy",
    ],
    claims=CLAIMS,
    headline=HEADLINE,
    smoke=Smoke(
        stages={
            "new": {"width": 24, "heads": 2, "layers": 1},
            "judges": {"prompts": SMALL_SETS, "steps": 2},
            "skills": {"recipe": merged(SMALL, {"evaluation": {"prompts": FEW[:3]}})},
            **{name: {"recipe": SMALL, "rates": [1e-3]} for name in RATE.values()},
            "samples": {"recipe": SMALL_TEST, "size": 4},
            "experts drawn": {"recipe": SMALL_TEST},
            "base": {"recipe": SMALL, "rounds": 2},
            "SFT": {"recipe": {key: value for key, value in SMALL.items() if key != "prompts"}},
            **{stage: {"recipe": SMALL} for stage in (*EXPERTS.values(), *TRAINED)},
        },
        arms={"recipe": SMALL_TEST},
    ),
)
