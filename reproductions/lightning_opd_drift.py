"""Lightning OPD (arXiv 2604.13010): score the fine-tuned student's responses once, then train without the teacher."""

from __future__ import annotations

from opd.reproductions import Claim, Reproduction, Smoke
from reproductions.lightning_opd_arms import (
    ANOTHER,
    ARMS,
    BARE,
    BEST,
    FEW_SEEDS,
    HIGHEST,
    LIGHTNING,
    LIVE,
    LONG,
    MORE,
    OF_SEEDS,
    SAME,
    SFT,
    SIBLING,
    THIRD,
    TRAINED,
    WHOLE,
    at,
    student,
)
from reproductions.lightning_opd_models import (
    BASE,
    BATCH,
    HELD_OUT,
    SFT_BATCH,
    SFT_STEPS,
    SHARES,
    SHORT,
    SIZE,
    STEPS,
    TERMS,
    sft,
    store,
    teacher,
    texts,
)
from reproductions.lightning_opd_premise import (
    DRIFT,
    GATES,
    HIGH,
    LEAST_GAIN,
    LOW,
    RATES,
    RULE,
    STAGES,
    TRIALS,
    WAYS,
    of_trial,
    store_of_trial,
    trial,
)

SEEDS = tuple(range(8))
MARGIN, KEPT, CHEAPER = 0.02, 0.8, 0.75
"""Accuracy that counts as none, share of live's gain that is to be kept, and share of live's cost that is claimed."""
TRIED = ", ".join(f"{rate:g}" for rate in RATES)


def equal(id: str, statement: str, method: str, baseline: str) -> Claim:
    return Claim(id, statement, "test_accuracy", "higher", method, baseline, test="equivalent", margin=MARGIN)


def more(
    id: str, statement: str, method: str, baseline: str, metric: str = "test_accuracy", margin: float = 0.0
) -> Claim:
    return Claim(id, statement, metric, "higher", method, baseline, margin=margin)


CLAIMS = [
    equal(
        "main",
        "At the rate of the rule Lightning is as accurate as live distillation at the same rate, within 2 points.",
        LIGHTNING,
        LIVE,
    ),
    more(
        "kept",
        "There it keeps at least four fifths of what live distillation gains over the fine-tuned student.",
        LIGHTNING,
        LIVE,
        "share_of_live_gain",
        KEPT - 1,
    ),
    more("gain", "There it gets more right than the fine-tuned student that it began from.", LIGHTNING, SFT),
    Claim(
        "cost",
        "With the fine-tuning counted on both sides it takes at most three quarters of live's CPU seconds.",
        "cost_of_live_with_sft",
        "lower",
        LIGHTNING,
        LIVE,
        margin=1 - CHEAPER,
    ),
    more(
        "consistency-offline",
        "On a store, students of A and of B learn more from their own teacher than from the other's.",
        SAME.format(way=LIGHTNING),
        ANOTHER.format(way=LIGHTNING),
    ),
    more(
        "consistency-live",
        "Live, students of A and of B learn more from their own teacher than from the other's.",
        SAME.format(way=LIVE),
        ANOTHER.format(way=LIVE),
    ),
    more(
        "passes-32",
        "Thirty-two passes over a sixteenth of the trajectories teach less than two over all.",
        LIGHTNING,
        LONG,
    ),
    equal(
        "best",
        "Each at the rate that is best for itself, Lightning is as accurate as live, within 2 points.",
        BEST[LIGHTNING],
        BEST[LIVE],
    ),
    more(
        "beyond",
        f"At {HIGHEST:g}, where the student drifts further than the paper presupposes, Lightning is more than 2 points "
        "behind live.",
        at(LIVE, HIGHEST),
        at(LIGHTNING, HIGHEST),
        margin=MARGIN,
    ),
    more(
        "gap-grows",
        f"At {HIGHEST:g} Lightning is further behind live than at the rate of the rule.",
        at(LIGHTNING, HIGHEST),
        LIGHTNING,
        "behind_live",
    ),
    more("live-gain", "Live distillation gets more right than the fine-tuned student.", LIVE, SFT),
    more("more-sft", "Lightning beats fine-tuning the student further instead.", LIGHTNING, MORE),
    more(
        "consistency-worse-offline",
        "Another teacher costs more accuracy on a store than live.",
        ANOTHER.format(way=LIGHTNING),
        ANOTHER.format(way=LIVE),
        "lost",
    ),
    equal("law", "The same law is enough: the sibling of A serves as well, within 2 points.", SIBLING, LIGHTNING),
    Claim(
        "drift-in-sample",
        "On the trajectories that are trained on the mean ratio of probabilities falls below 1.",
        "drift_in_sample",
        "lower",
        LIGHTNING,
        SFT,
    ),
    equal("steps", "A third of the steps is enough, within 2 points.", THIRD, LIGHTNING),
    equal("clamp", "Without the clamp Lightning is as accurate, within 2 points.", BARE, LIGHTNING),
    more("vocabulary", "On the same store the whole vocabulary teaches more.", WHOLE, LIGHTNING),
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
]

FEW = {"prompts": {"size": 8}, "max_new_tokens": 16, "k": 2}
SMALL = {
    "steps": 2,
    "prompts": {"size": 24},
    "rollout": {"max_new_tokens": 16},
    "batch": {"prompts": 4, "micro": 4},
}
SMALL_SFT = {"recipe": {**SMALL, "evaluation": {"prompts": {"size": 8}, "every": 0, "max_new_tokens": 16}}}
SMALL_OPD = {"recipe": {**SMALL, "evaluation": {"held_out": 8, "every": 0, "max_new_tokens": 16}}}

reproduction = Reproduction(
    title="Lightning OPD, where the student hardly drifts",
    introduction=f"""
The student was fine-tuned on what a teacher wrote. Does it matter, then, whether the teacher is asked during training
(live), or once about trajectories that the student wrote before (Lightning)? Same objective, learning rate, steps and
number of trajectories.

**Task.** Running sums modulo 10 of {TERMS[0]} to {TERMS[1]} digits, written step by step. All models are Llamas of 2
layers and width 64.

**Teachers** speak dialects of equal skill: a step is written `b+a=c` rather than `a+b=c` with probability
{SHARES["A"]:g} (A) or {SHARES["B"]:g} (B). Both are one teacher, fine-tuned on a dialect, and the sibling of A saw the
same dialect under another seed.

**Students** begin from a base that learnt sums of {SHORT[0]} to {SHORT[1]} digits and then too few of the long ones,
with {SFT_STEPS} batches of {SFT_BATCH} of what A (or B) wrote.

**Premise.** Gates before any arm:

- Every student is right in {100 * LOW:.0f} to {100 * HIGH:.0f} of 100 samples at temperature 1 on validation problems,
  so that there is something to learn, and every teacher in 85.
- At the rate of the rule live gains at least {100 * LEAST_GAIN:.0f} points with either seed that the rule looked at.
- The **theory**, by enumeration of all sequences of four tokens from four ids: the gap between both gradients is the
  covariance of theorem 3.7, is within the bounds of 3.5 and 3.8, is zero at the start and doubles with the second step.

**Training** takes {STEPS} steps of {BATCH} trajectories of {SIZE:,} other problems, two passes; `sequence_mean`, clamp
10, temperature 1; the rate falls along a cosine to a tenth, in every arm.

**The rule.** Both ways are trained at {TRIED}. The paper presupposes a student that stays near to the one that wrote
the store: a spread of the ratios of probability, now over then, below {DRIFT:g} on the tokens that are trained on. So
*live* and *Lightning* are compared at the highest rate up to which that holds, in the last quarter of the steps, with
both of two seeds that no arm has.

*Best rate* takes for each way the rate that was most accurate there, on validation problems, whatever the drift. All
rates stay on this page: at {HIGHEST:g} the theory predicts that Lightning falls behind.

**Other arms** train at the rate of the rule, with {FEW_SEEDS} seeds:

- students of A and B under their own teacher and under each other's, pooled over both;
- 32 passes over a sixteenth of the trajectories;
- a third of the steps;
- no clamp;
- the sibling of A;
- reverse KL over the whole vocabulary on the same store.

*More SFT* goes on with the fine-tuning at {HIGHEST:g}.

**Figures** are from 500 test problems, four samples each at temperature 1, and greedy.

**Costs** are CPU seconds of one thread. Lightning's hold its rollouts and their scoring, the models' loading included.

- `cost of live` is a share of what live takes with the same seed.
- `cost of live with sft` is the same after the cost of fine-tuning (`sft cpu seconds`: the teacher's writing and the
  training) was added to both.

**Drift** is the ratio of the student's probability of a stored token to what it was when it was written: on held-out
problems, and in sample. **sigma delta** is the distance of the scoring teacher to the one of fine-tuning.

**Gradient gap, bound** and **size** are theorem 3.5's two sides at the trained student and the norm of the offline
gradient, from {HELD_OUT} trajectories of the store that it was not trained on.
""",
    discussion="",
    stages={**STAGES, **OF_SEEDS},
    gates=GATES,
    arms=ARMS,
    seeds=SEEDS,
    imports=["reproductions.lightning_opd_drift"],
    metrics=[
        "test_accuracy",
        "test_greedy_accuracy",
        "gain",
        "share_of_live_gain",
        "behind_live",
        "rate",
        "drift_in_sample",
        "drift_std_in_sample",
        "drift",
        "drift_std",
        "gradient_gap",
        "gradient_bound",
        "gradient_size",
        "advantage_size",
        "clamped",
        "sigma_delta",
        "lost",
        "sft_cpu_seconds",
        "cost_of_live",
        "cost_of_live_with_sft",
    ],
    claims=CLAIMS,
    headline=("main", "kept", "gain", "cost", "consistency-offline", "consistency-live", "passes-32", "best"),
    smoke=Smoke(
        stages={
            **dict.fromkeys(("short", BASE, "teacher", *map(teacher, SHARES)), SMALL_SFT),
            "teachers": {"test": FEW},
            **{texts(name): {"recipe": SMALL} for name in ("A", "B")},
            **dict.fromkeys((*map(of_trial, TRIALS), sft("A"), sft("B")), SMALL_SFT),
            **dict.fromkeys((*map(store_of_trial, TRIALS), store("A"), store("B")), SMALL_OPD),
            **{trial(way, seed): {**SMALL_OPD, "test": FEW, "rates": [3e-5]} for way in WAYS for seed in TRIALS},
            RULE: {"rates": [3e-5]},
            **{name: {**SMALL_OPD, "test": FEW} for name in TRAINED if "recipe" in TRAINED[name].params},
            **{name: {"test": FEW} for name in TRAINED if "recipe" not in TRAINED[name].params},
            student(MORE): {**SMALL_SFT, "test": FEW},
        },
    ),
)
