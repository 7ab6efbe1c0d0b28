"""Lightning OPD (arXiv 2604.13010): score the fine-tuned student's responses once, then train without the teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.reproductions import Claim, Gate, Reproduction, Smoke, Stage, train
from opd.reproductions.definition import COSTS, Figures, merged
from reproductions.enumeration import gradient_gap
from reproductions.lightning_opd_jobs import LATE, late, written
from reproductions.lightning_opd_models import dialect, stored, teacher
from reproductions.lightning_opd_premise import SHARED_GATES
from reproductions.on_policy import at_rate, best_rate, supervised
from reproductions.running_sum import figures_of, new_model, prompts, recipe, tested

TERMS, BUDGET = (5, 8), 96
STEPS, BATCH, RATES = 200, 32, (3e-4, 1e-3)
RATES_OF_LIGHTNING = (1e-4, *RATES)
SIZE, HELD_OUT = 3200, 128
"""Prompts that are trained on: two passes, as in the paper; and prompts that are only measured."""
SFT_PROMPTS, SFT_STEPS = 6400, 300
TEST = {"prompts": prompts(TERMS, 500, "test"), "max_new_tokens": BUDGET, "samples": 0, "k": 4, "greedy": True}
FEW_SEEDS = 3
MARGIN = 0.02
SHARES = {"A": 0.1, "A2": 0.1, "30": 0.3, "50": 0.5, "70": 0.7, "B": 0.9}
"""Share of the swapped writing of a step in each teacher's dialect, `b+a=c` in place of `a+b=c`."""


def student(name: str) -> str:
    return f"student: {name}"


# -- the recipes -------------------------------------------------------------------------------------------------------


def of_dialect(name: str) -> dict[str, Any]:
    """A teacher: the common one, fine-tuned on solutions in one dialect."""
    rate = {"learning_rate": {"start": 1e-3, "end": 1e-4}}
    return merged(supervised("{teacher}/run/student", 250), {"prompts": dialect(SHARES[name]), "update": rate})


def writing(teacher_name: str) -> dict[str, Any]:
    """What `opd rollout` needs to have a teacher write the fine-tuning data."""
    rollout = {"kind": "teacher"}
    block = recipe("{base}/run/student", TERMS, BUDGET, 1, 1e-3, f"{{{teacher(teacher_name)}}}/run/student")
    return merged(block, {"rollout": rollout, "prompts": {"size": SFT_PROMPTS}, "objective": ["sft"]})


def fine_tuning(of: str, data: str, steps: int, rate: float, batch: int) -> dict[str, Any]:
    """Supervised fine-tuning on what a teacher wrote; its saved student says which teacher that was."""
    own = {"rollout": stored(data), "prompts": {"size": SFT_PROMPTS}, "objective": ["sft"]}
    block = recipe(of, TERMS, BUDGET, steps, rate, batch={"prompts": batch, "micro": batch})
    return merged(block, {**own, "evaluation": {"every": 50}})


def live(sft: str, asked: str) -> dict[str, Any]:
    """The online arm: the student writes now and the teacher is asked now."""
    block = recipe(f"{{SFT {sft}}}/run/student", TERMS, BUDGET, STEPS, 0.0, f"{{{teacher(asked)}}}/run/student")
    own = {
        "prompts": prompts(TERMS, SIZE + HELD_OUT, "train", seed=1),
        "objective": [{"kind": "lightning"}],
        "reduction": "sequence_mean",
        "batch": {"prompts": BATCH, "micro": BATCH},
        "evaluation": {"prompts": [], "held_out": HELD_OUT, "every": 50},
    }
    return merged(block, own)


def offline(sft: str, targets: str, store: str = "", **changes: Any) -> dict[str, Any]:
    """The same objective on a store: no teacher is loaded."""
    place = stored(store or f"store {sft}")
    answers = {**place, "targets": targets, "consistency": "required" if sft == targets else "ignored"}
    return merged(live(sft, sft), {"rollout": place, "teacher": [answers], **changes})


def matched(**changes: Any) -> dict[str, Any]:
    return offline("A", "A", **changes)


def passes(number: int) -> dict[str, Any]:
    return matched(prompts={"size": STEPS * BATCH // number + HELD_OUT})


# -- the stages --------------------------------------------------------------------------------------------------------


def compared(folder: Path, inputs: Mapping[str, Path], *, test: Mapping[str, Any], seed: int) -> Figures:
    """Accuracy of every teacher, and how far those of the two dialects and the sibling lie apart."""
    found = {}
    for name, place in inputs.items():
        (folder / name).mkdir()
        figures = tested(folder / name, {"of": place}, student="{of}/run/student", test=test, seed=seed)
        found[name] = figures["test_accuracy"]
    main = [found[teacher(name)] for name in ("A", "A2", "B")]
    return {**found, "spread": max(main) - min(main), "lowest": min(found.values())}


def distilled(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    store: str | None = None,
    rate: str = "rate",
    seed: int,
) -> Figures:
    """Train a student at the rate that a stage chose. On a store, the cost holds what its rollouts and these targets
    took, and the curve begins there; `drift_in_sample` and others are means over the last quarter of the steps."""
    block = at_rate(recipe, figures_of(inputs[rate])["rate"])
    figures = train(folder, {name: place for name, place in inputs.items() if name != rate}, recipe=block, seed=seed)
    if store is not None:
        made, targets = figures_of(inputs[store]), recipe["teacher"][0]["targets"]
        tokens = made["sampled_tokens"]
        spent = {
            "cpu_seconds": made["cpu_seconds"] + made[f"score_cpu_seconds {targets}"],
            "sampled_tokens": tokens,
            "teacher_tokens": tokens,
        }
        for record in (figures, *figures["curve"]):
            record |= {name: record[name] + spent[name] for name in COSTS}
        figures |= {"sigma_delta": made.get(f"distance {targets}", 0.0), **late(folder / "run")}
    return figures


def measured(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    of: str,
    sft: Sequence[str],
    test: Mapping[str, Any],
    against: str | None = None,
    seed: int,
) -> Figures:
    """A student of this seed on the test prompts; costs and curve are its training's. `sft` are the stages that made
    the student that it began from, whose cost stands beside each ratio; `lost` is what it is behind `against`."""
    trained = figures_of(inputs[of])
    before = sum(figures_of(inputs[stage])["cpu_seconds"] for stage in sft)
    found = tested(folder, {"of": inputs[of]}, student="{of}/run/student", test=test, seed=seed)
    kept = ("drift", "drift_std", "sigma_delta", *LATE.values())
    figures = {
        **{name: trained[name] for name in kept if name in trained},
        **{name: trained[name] for name in COSTS},
        **found,
        "curve": trained["curve"],
        "sft_cpu_seconds": before,
    }
    if student("live") in inputs:
        own, online = trained["cpu_seconds"], figures_of(inputs[student("live")])["cpu_seconds"]
        figures |= {"speed_up": online / own, "speed_up_with_sft": (online + before) / (own + before)}
    if of in sft:
        # It is the student that the others moved from.
        figures |= {"drift": 1.0, "drift_std": 0.0, "drift_in_sample": 1.0, **dict.fromkeys(COSTS, 0.0)}
    if against is not None:
        (folder / "against").mkdir()
        place = {"of": inputs[against]}
        other = tested(folder / "against", place, student="{of}/run/student", test=test, seed=seed)
        figures["lost"] = other["test_accuracy"] - found["test_accuracy"]
    return figures


# -- the arms ----------------------------------------------------------------------------------------------------------

LIVE, LIGHTNING, OWN_RATE = "live", "Lightning", "Lightning, own rate"
MAIN: dict[str, dict[str, Any]] = {
    "more SFT": fine_tuning("{SFT A}/run/student", "written by A", 2 * STEPS, 0.0, BATCH),
    LIVE: live("A", "A"),
    LIGHTNING: matched(),
}
MISMATCHED = {
    f"{way}, SFT {sft}, OPD {asked}": make(sft, asked)
    for way, make in ((LIVE, live), (LIGHTNING, offline))
    for sft, asked in (("A", "B"), ("B", "A"), ("B", "B"))
}
TWO_DRAWS = "store A, two draws"
ABLATIONS = {
    **MISMATCHED,
    "Lightning, sibling of A": offline("A", "A2"),
    **{f"Lightning, {share} % of B": offline("A", share) for share in ("30", "50", "70")},
    "Lightning, a third of the steps": matched(steps=STEPS // 3),
    "Lightning, 1 pass": matched(store=TWO_DRAWS),
    "Lightning, 8 passes": passes(8),
    "Lightning, 32 passes": passes(32),
    "Lightning, no clamp": matched(objective=[{"kind": "lightning", "clamp": None}]),
    "Lightning, clamp at 1": matched(objective=[{"kind": "lightning", "clamp": 1.0}]),
    "Lightning, whole vocabulary": offline(
        "A", "exact", objective=["reverse_kl"], teacher=[{**stored("store A"), "targets": "exact"}]
    ),
}


def stages_of(block: Mapping[str, Any]) -> list[str]:
    """The stages that a recipe's texts name."""
    text = json.dumps(block)
    return [name for name in SHARED if f"{{{name}}}" in text]


def store_of(block: Mapping[str, Any]) -> str | None:
    """The store that a recipe takes targets from."""
    on_store = bool(block["teacher"]) and block["teacher"][0].get("kind") == "stored"
    return next(name for name in stages_of(block) if name.startswith("store")) if on_store else None


def store(sft: str, targets: Sequence[str], exact: bool = False, draws: int = 1, seeds: int | None = None) -> Stage:
    """The rollouts of a fine-tuned student with the answers of several teachers."""
    scored_by: dict[str, Any] = {name: {"teacher": name} for name in targets}
    if exact:
        scored_by["exact"] = {"teacher": sft, "kind": "exact"}
    params = {"recipe": live(sft, sft), "scored_by": scored_by, "draws": draws}
    return Stage(written, params, [f"SFT {sft}", *map(teacher, targets)], per_seed=True, seeds=seeds)


def trained_stage(block: Mapping[str, Any], seeds: int | None = None) -> Stage:
    params = {"recipe": block, "store": store_of(block)}
    return Stage(distilled, params, ["rate", *stages_of(block)], per_seed=True, seeds=seeds)


def arm(name: str, sft: str, seeds: int | None = None) -> Stage:
    made = [f"written by {sft}", f"SFT {sft}"]
    of = student(name) if student(name) in TRAINED else made[1]
    against = student(name.partition(",")[0]) if name in MISMATCHED and sft == "A" else None
    inputs = [*made, *([student(LIVE)] if sft == "A" and of != made[1] else []), of, *([against] if against else [])]
    params: dict[str, Any] = {"of": of, "sft": made, "test": TEST}
    params |= {"against": against} if against else {}
    return Stage(measured, params, list(dict.fromkeys(inputs)), seeds=seeds)


def for_the_rate(block: Mapping[str, Any]) -> dict[str, Any]:
    return merged(block, {"student": {"model": "{SFT for the rate}/run/student"}})


def sft_of(name: str) -> str:
    return "B" if "SFT B" in name else "A"


RATE_OF_LIGHTNING = "rate of Lightning"
TEACHERS = [teacher(name) for name in SHARES]
SHARED: dict[str, Stage] = {
    "theory": Stage(gradient_gap, {"distances": [0.01, 0.1, 0.3, 1.0], "other": 0.5}),
    "new": Stage(new_model, {"width": 64, "layers": 2, "heads": 4, "seed": 0}),
    "base": Stage(train, {"recipe": supervised("{new}/model", 1200), "seed": 0}, ["new"]),
    "teacher": Stage(train, {"recipe": supervised("{base}/run/student", 2000), "seed": 1}, ["base"]),
    **{
        teacher(name): Stage(train, {"recipe": of_dialect(name), "seed": 2 + i}, ["teacher"])
        for i, name in enumerate(SHARES)
    },
    "teachers": Stage(compared, {"test": {**TEST, "k": 2, "greedy": False}, "seed": 0}, TEACHERS),
    **{
        f"written by {name}": Stage(written, {"recipe": writing(name), "seed": 0}, ["base", teacher(name)])
        for name in ("A", "B")
    },
    **{
        f"SFT {name}": Stage(
            train,
            {"recipe": fine_tuning("{base}/run/student", f"written by {name}", SFT_STEPS, 3e-3, 64)},
            ["base", f"written by {name}"],
            per_seed=True,
            seeds=seeds,
        )
        for name, seeds in (("A", None), ("B", FEW_SEEDS))
    },
    "SFT for the rate": Stage(
        train,
        {"recipe": fine_tuning("{base}/run/student", "written by A", SFT_STEPS, 3e-3, 64), "seed": 100},
        ["base", "written by A"],
    ),
    "rate": Stage(
        best_rate,
        {
            "recipe": for_the_rate(live("A", "A")),
            "rates": list(RATES),
            "seed": 100,
        },
        ["SFT for the rate", teacher("A")],
    ),
    "store for the rate": Stage(
        written,
        {"recipe": for_the_rate(live("A", "A")), "scored_by": {"A": {"teacher": "A"}}, "seed": 100},
        ["SFT for the rate", teacher("A")],
    ),
    RATE_OF_LIGHTNING: Stage(
        best_rate,
        {
            "recipe": for_the_rate(offline("A", "A", store="store for the rate")),
            "rates": list(RATES_OF_LIGHTNING),
            "seed": 100,
        },
        ["SFT for the rate", "store for the rate"],
    ),
    "store A": store("A", list(SHARES), exact=True),
    "store B": store("B", ["B", "A"], seeds=FEW_SEEDS),
    TWO_DRAWS: store("A", ["A"], draws=2, seeds=FEW_SEEDS),
}
TRAINED = {
    **{student(name): trained_stage(block) for name, block in MAIN.items()},
    **{student(name): trained_stage(block, FEW_SEEDS) for name, block in ABLATIONS.items()},
    student(OWN_RATE): Stage(
        distilled,
        {"recipe": matched(), "store": "store A", "rate": RATE_OF_LIGHTNING},
        [RATE_OF_LIGHTNING, *stages_of(matched())],
        per_seed=True,
    ),
}


def equal(id: str, statement: str, method: str, baseline: str = LIGHTNING, margin: float = MARGIN) -> Claim:
    return Claim(id, statement, "test_accuracy", "higher", method, baseline, test="equivalent", margin=margin)


def more(id: str, statement: str, method: str, baseline: str, metric: str = "test_accuracy") -> Claim:
    return Claim(id, statement, metric, "higher", method, baseline)


CONSISTENCY = [
    more(
        f"consistency-{way}-{side}-{row}".lower(),
        f"{way}: {statement}",
        way if row == "A" else f"{way}, SFT B, OPD B",
        f"{way}, SFT {other[0]}, OPD {other[1]}",
    )
    for way in (LIVE, LIGHTNING)
    for row, side, statement, other in (
        ("A", "row", "a student of teacher A learns more from A than from B.", "AB"),
        ("B", "row", "a student of teacher B learns more from B than from A.", "BA"),
        ("A", "column", "teacher A teaches its own student better than B's.", "BA"),
        ("B", "column", "teacher B teaches its own student better than A's.", "AB"),
    )
]

FEW = {"prompts": {"size": 8}, "max_new_tokens": 16, "k": 2}
SMALL_PROMPTS = {"size": 24}
SMALL = {"steps": 2, "prompts": SMALL_PROMPTS, "rollout": {"max_new_tokens": 16}, "batch": {"prompts": 4}}
SMALL_SFT = {**SMALL, "evaluation": {"prompts": {"size": 8}, "every": 0, "max_new_tokens": 16}}
SMALL_OPD = {**SMALL, "evaluation": {"held_out": 8, "every": 0, "max_new_tokens": 16}}

reproduction = Reproduction(
    title="Lightning OPD",
    introduction=f"""
The student was fine-tuned on what a teacher wrote. Does it matter, then, whether the teacher is asked during training
(live), or once about trajectories that the student wrote before (Lightning)? Same objective, learning rate, steps and
number of trajectories.

**Task.** Running sums modulo 10 of {TERMS[0]} to {TERMS[1]} digits, written step by step. All models are Llamas of 2
layers and width 64.

**Teachers** speak dialects of equal skill: a step is written `b+a=c` rather than `a+b=c` with probability 0.1 (A), 0.9
(B), or between. All are one teacher, fine-tuned on a dialect, and the sibling of A saw the same dialect under another
seed.

**Students** begin from the base of the [on-policy experiment](on-policy.md), with {SFT_STEPS} batches of 64 of what A
(or B) wrote for {SFT_PROMPTS} problems.

**Training** takes {STEPS} steps of {BATCH} trajectories of {SIZE} other problems, two passes; `sequence_mean`, clamp
10, temperature 1. The main row has five seeds, everything else three.

**The learning rate** is the better of {" and ".join(f"{rate:g}" for rate in RATES)} by held-out accuracy of the *live*
arm under a seed of its own; for the arm with a rate of its own it is the best of
{", ".join(f"{r:g}" for r in RATES_OF_LIGHTNING)} by that of Lightning.

**Figures** are from 500 test problems, four samples each.

**Costs** are CPU seconds of one thread.

- Lightning's hold its rollouts and their scoring, the models' loading included. An arm with fewer prompts still pays
  for the whole store.
- `speed up` is the live arm's cost over an arm's own.
- `speed up with sft` is the same after the cost of fine-tuning (`sft cpu seconds`: the teacher's writing and the
  training) was added to both.

**Drift** is the ratio of the student's probability of a stored token to what it was when it was written: on held-out
problems, and in sample over the last quarter of training. **sigma delta** is the distance of the scoring teacher to the
one of fine-tuning.

**Theory.** By enumeration of all sequences of four tokens from four ids: the gap between both gradients is the
covariance of theorem 3.7, is within the bounds of 3.5 and 3.8, is zero at the start and doubles with the second step.
Those are gates: no arm runs where they do not hold.
""",
    discussion="""
## Why it came out so

**Lightning is not as good as live here, and the stored tokens are why.** Live distillation takes the fine-tuned student
from 0.71 to 0.79. Lightning at the same learning rate takes it down to 0.61, and further fine-tuning at the cost of
Lightning reaches 0.76.

On the same stored trajectories, with the same teacher's stored hidden states, the whole vocabulary reaches 0.84 (three
seeds; live has 0.79 on them, and no claim holds the two against each other). So old states can still teach; one sampled
token a state, drawn from a student that is gone and weighed without a ratio of probabilities, did not. (The whole
vocabulary with a live teacher was not run.)

What bounds the noise of that token has higher means: a clamp at 1 keeps 0.70, a tenth of the learning rate 0.73.

**At a learning rate of its own** (1e-4, the lowest that was tried, where live takes the highest) Lightning is behind
live by 0.07, and no difference to the student that it began from is found. The paper's rate is lower than any here.

**The same teacher matters, offline.** With another dialect's teacher Lightning ends 0.27 to 0.35 lower in all four
comparisons, the lower the further that teacher is (A, 30, 50 and 70 % of B, B: 0.61, 0.53, 0.46, 0.38, 0.26). A and
half of B, and half of B and B, are told apart by themselves. The sibling with the same law has 0.63, which three seeds
cannot call equal or not.

**Live**, all four comparisons are undecided. So the paper's claim of consistency is reproduced offline only; it is the
reason why `opd` refuses a store of another teacher.

**Drift.** On the trajectories that are trained on the mean ratio falls below one, by 0.008: the student moves away from
the tokens that it once drew. On held-out problems it stays at one (0.999), but in expectation that holds by definition
for tokens that were drawn at temperature 1, whatever the student has become, and is no claim; how far it went is in the
spread.

**Cost.** Two passes over one set take half the rollouts and half the teacher's answers of live training (112,500 tokens
against 224,600), so that they cost less by design, and no claim is made of it: `speed up` is 1.6, and 1.2 with the
fine-tuning on both sides. One pass, with as many rollouts as live, has 1.04 to 1.35 over three seeds. Costs were
measured beside other work, which seeds share unequally.

**Curves** of accuracy were not kept: results held points only under the names of test metrics. The figure above shows
the drift of the arms on a store.

**What was chosen after looking.**

- The headline claims: what the paper leads with (as accurate as live, here also at a rate of its own; better than the
  fine-tuned student; the same teacher, live and offline, and that it matters more offline; the scale). Of the four
  comparisons each of the same teacher the first stands for all; the rest is in the appendix.
- The arm at a rate of its own was added after the first grid had shown Lightning behind; its grid has one rate more
  than live's, below it.

The other arms stand as they were before the first run.

## Where it differs from the paper

The learning rate falls along a cosine, where the paper's is constant. Teacher and student are of one size, so that the
live arm's teacher is cheap and the saving smaller than with a large one; what a large one saves is
[measured by itself](../store.md#what-it-saves).
""",
    stages={**SHARED, **TRAINED},
    gates=[
        *SHARED_GATES,
        Gate("SFT A", "accuracy", at_least=0.35),
        Gate("SFT A", "accuracy", at_most=0.75),
    ],
    arms={
        "SFT": arm("SFT", "A"),
        **{name: arm(name, "A") for name in (*MAIN, OWN_RATE)},
        "SFT B": arm("SFT B", "B", FEW_SEEDS),
        **{name: arm(name, sft_of(name), FEW_SEEDS) for name in ABLATIONS},
    },
    seeds=(0, 1, 2, 3, 4),
    metrics=[
        "test_accuracy",
        "test_greedy_accuracy",
        "sft_cpu_seconds",
        "speed_up",
        "speed_up_with_sft",
        "drift",
        "drift_std",
        "drift_in_sample",
        "drift_std_in_sample",
        "advantage_size",
        "clamped",
        "sigma_delta",
        "lost",
    ],
    claims=[
        equal("main", "Lightning is as accurate as live distillation, within 2 points.", LIGHTNING, LIVE),
        equal("near", "Lightning is as accurate as live distillation, within 5 points.", LIGHTNING, LIVE, 0.05),
        more("gain", "Lightning gets more right than the fine-tuned student that it began from.", LIGHTNING, "SFT"),
        equal(
            "own-rate",
            "At a learning rate of its own Lightning is as accurate as live distillation, within 5 points.",
            OWN_RATE,
            LIVE,
            0.05,
        ),
        more(
            "own-rate-gain",
            "At a learning rate of its own Lightning gets more right than the fine-tuned student.",
            OWN_RATE,
            "SFT",
        ),
        more("live-gain", "Live distillation gets more right than the fine-tuned student.", LIVE, "SFT"),
        more("more-sft", "Lightning beats fine-tuning the student further instead.", LIGHTNING, "more SFT"),
        *CONSISTENCY,
        more(
            "consistency-worse-offline",
            "Another teacher costs more accuracy offline than live.",
            "Lightning, SFT A, OPD B",
            "live, SFT A, OPD B",
            "lost",
        ),
        equal(
            "law",
            "The same law is enough: the sibling of A serves as well, within 2 points.",
            "Lightning, sibling of A",
        ),
        more("dose-low", "The nearer the teacher the better: A before half of B.", LIGHTNING, "Lightning, 50 % of B"),
        more(
            "dose-high",
            "The nearer the teacher the better: half of B before B.",
            "Lightning, 50 % of B",
            "Lightning, SFT A, OPD B",
        ),
        Claim(
            "drift-in-sample",
            "On the trajectories that are trained on the mean ratio of probabilities falls below 1.",
            "drift_in_sample",
            "lower",
            LIGHTNING,
            "SFT",
        ),
        equal("steps", "A third of the steps is enough, within 2 points.", "Lightning, a third of the steps"),
        equal("passes-1", "Two passes over one set are as good as one over two, within 2 points.", "Lightning, 1 pass"),
        equal("passes-8", "Eight passes are as good as two, within 2 points.", "Lightning, 8 passes"),
        more("passes-32", "After thirty-two passes Lightning is behind two.", LIGHTNING, "Lightning, 32 passes"),
        equal("clamp", "Without the clamp Lightning is as accurate, within 2 points.", "Lightning, no clamp"),
        more(
            "vocabulary",
            "On the same store the whole vocabulary teaches more.",
            "Lightning, whole vocabulary",
            LIGHTNING,
        ),
        Claim(
            "sft-budget",
            "The order of Lightning, live and fine-tuned holds at every budget of fine-tuning.",
            testable=False,
            note="One budget of fine-tuning is run here.",
        ),
        Claim(
            "scale",
            "Lightning is 3.6 to 4 times cheaper than live and a point better at four and eight billion parameters.",
            testable=False,
            note="That needs the paper's models and prompts: `recipes/lightning_qwen3_4b.yaml`.",
        ),
    ],
    headline=(
        "main",
        "gain",
        "own-rate",
        "consistency-live-row-a",
        "consistency-lightning-row-a",
        "consistency-worse-offline",
        "scale",
    ),
    smoke=Smoke(
        stages={
            **{key: {"recipe": SMALL_SFT} for key in ("base", "teacher", *TEACHERS)},
            "teachers": {"test": FEW},
            **{key: {"recipe": SMALL_SFT} for key in ("written by A", "written by B")},
            **{key: {"recipe": SMALL_SFT} for key in ("SFT A", "SFT B", "SFT for the rate")},
            **{key: {"recipe": SMALL_OPD, "rates": [1e-3]} for key in ("rate", RATE_OF_LIGHTNING)},
            **{key: {"recipe": SMALL_OPD} for key in ("store for the rate", "store A", "store B", TWO_DRAWS)},
            **{key: {"recipe": SMALL_OPD} for key in TRAINED},
            student("more SFT"): {"recipe": SMALL_SFT},
        },
        arms={"test": FEW},
    ),
)
