"""Uni-OPD (arXiv 2605.03677): prompts, outcomes and the teacher's word, balanced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.reproductions import Claim, Reproduction, Smoke, Stage
from opd.reproductions.definition import Figures, merged
from reproductions.on_policy import at_rate, best_rate
from reproductions.running_sum import figures_of, student_tested
from reproductions.uni_opd_controls import ShuffledShift
from reproductions.uni_opd_models import CAP, EXPERTS, SAVED, STAGES, STUDENT, TASKS, WRONG, both, recipe
from reproductions.uni_opd_premise import GATES, STAGE

STEPS, BATCH, GROUP, SIZE = 150, 12, 8, 300
RATES = (1e-4, 3e-4, 1e-3)
DELTA = 0.4
TEST = {"prompts": both(300, "test"), "max_new_tokens": CAP, "samples": 0, "k": 4}
TRIED = ", ".join(f"{rate:g}" for rate in RATES)

GATE = {"kind": "log_ratio_gate", "limit": 10}
SHIFT = {"kind": "margin_shift", "direction": "spread", "statistic": "mean", "delta": DELTA}
MASK = {"kind": "margin_mask", "statistic": "mean", "delta": DELTA}
BALANCE = {"kind": "outcome_balance", "ratio": 1}
FIXED = {"kind": "outcome_bonus", "form": "fixed", "amount": DELTA / 2}
NORMALISED = {"kind": "outcome_bonus", "form": "normalised", "amount": DELTA / 2}
SHUFFLED = {**SHIFT, "kind": ShuffledShift.model_fields["kind"].default}
DIFFICULTY = {"curriculum": {"kind": "difficulty", "responses": 8, "by": "task"}}


def shaped(*shapings: Mapping[str, Any]) -> dict[str, Any]:
    return {"shaping": [*shapings, GATE]}


OPD, FULL, ONLY_SHIFT = "OPD", "Uni-OPD", "shift"
ARMS: dict[str, dict[str, Any]] = {
    OPD: shaped(),
    FULL: {**DIFFICULTY, **shaped(SHIFT, BALANCE)},
    "without difficulty": shaped(SHIFT, BALANCE),
    "without balance": {**DIFFICULTY, **shaped(SHIFT)},
    "without margins": {**DIFFICULTY, **shaped(BALANCE)},
    ONLY_SHIFT: shaped(SHIFT),
    "mask": shaped(MASK),
    "fixed bonus": shaped(FIXED),
    "normalised bonus": shaped(NORMALISED),
    "shuffled labels": shaped(SHUFFLED),
    "GRPO": {"teacher": [], "objective": ["grpo"], "shaping": ["uniform"]},
}
"""What each changes of plain OPD."""
RATE_OF = {
    "without difficulty": FULL,
    "without balance": FULL,
    "without margins": FULL,
    "shuffled labels": ONLY_SHIFT,
}
"""Arms that take another's learning rate; the others have one of their own."""


def distilled(changes: Mapping[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """OPD of the student from the two experts; its learning rate is put in when it is known."""
    routes = {task: {"model": f"{{{name}}}/{SAVED}", "template": "plain"} for task, name in EXPERTS.items()}
    own = {
        "teacher": [{"kind": "routed", "by": "task", "routes": routes}],
        "prompts": both(SIZE, "train"),
        "objective": ["reverse_kl_sampled"],
        "reduction": "sequence_mean",
        "batch": {"prompts": BATCH, "group": GROUP, "micro": BATCH * GROUP},
        "evaluation": {"every": 50},
    }
    return merged(recipe(f"{{{STUDENT}}}/{SAVED}", steps, 0.0, **own), changes)


# -- the jobs ----------------------------------------------------------------------------------------------------------

LOGGED = {
    "margin/mixed": "mixed",
    "margin/before": "margin",
    "margin/lam": "lam",
    "margin/inverted_pairs": "inverted_pairs",
    "margin/calibrated": "calibrated",
    "balance/kept": "kept",
    "balance/right_kept": "right_kept",
    "bonus/mixed": "mixed",
    "gated": "gated",
    "reward": "reward",
    "length": "length",
}
"""What is kept of every step that logs it: the means over the first and over the last ten steps."""
ENDS = 10


def trained(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    test: Mapping[str, Any],
    rate: str,
    seed: int,
) -> Figures:
    """Train a student of one seed at the rate that a stage chose, and test it, each task by itself too."""
    block = at_rate(recipe, figures_of(inputs[rate])["rate"])
    models = {name: place for name, place in inputs.items() if name != rate}
    figures = student_tested(folder, models, recipe=block, test=test, seed=seed)
    figures |= by_task(figures["items"]["test_accuracy"])
    return {**figures, **ends(folder / "run"), "rate": figures_of(inputs[rate])["rate"]}


def by_task(verdicts: Mapping[str, float]) -> Figures:
    """`test_accuracy_TASK` and the `worst` of them, from one value for each problem; its id begins with the task."""
    found = {}
    for task in TASKS:
        own = [value for name, value in verdicts.items() if name.startswith(task)]
        found[f"test_accuracy_{task}"] = sum(own) / len(own)
    return {**found, "test_accuracy_worst": min(found.values())}


def ends(run: Path) -> Figures:
    """`first_NAME` and `last_NAME` of what `LOGGED` names; of margins 0 where no prompt ever had both outcomes."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "train/loss" in record]
    found: Figures = {}
    for key, name in LOGGED.items():
        values = [step[f"train/{key}"] for step in steps if f"train/{key}" in step]
        if not values and key.startswith("margin/") and "train/margin/mixed" in steps[0]:
            values = [0.0]
        if values:
            found |= {f"first_{name}": mean(values[:ENDS]), f"last_{name}": mean(values[-ENDS:])}
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rate_stage(name: str) -> str:
    return f"rate of {RATE_OF.get(name, name)}"


def models(name: str) -> list[str]:
    """The models that an arm's job takes: GRPO has no teacher."""
    return [STUDENT] if ARMS[name].get("teacher") == [] else [STUDENT, *EXPERTS.values()]


def arm(name: str) -> Stage:
    params = {"recipe": distilled(ARMS[name]), "test": TEST, "rate": rate_stage(name)}
    return Stage(trained, params, [*models(name), rate_stage(name)])


def better(id: str, statement: str, method: str, baseline: str, metric: str = "test_accuracy") -> Claim:
    return Claim(id, statement, metric, "higher", method, baseline)


TUNED = [name for name in ARMS if name not in RATE_OF]


def few(size: int, split: str, tokens: int = 24) -> dict[str, Any]:
    """An evaluation block of the smoke run; a list of prompts is replaced as a whole."""
    return {"prompts": both(size, split), "max_new_tokens": tokens}


FEW_STEPS: dict[str, Any] = {
    "steps": 2,
    "batch": {"prompts": 4, "micro": 32},
    "prompts": both(16, "train"),
    "evaluation": few(4, "validation", 16),
}
"""Of an arm's recipe, in the smoke run."""

reproduction = Reproduction(
    title="Uni-OPD",
    introduction=f"""
Does it pay to move a teacher's word by the outcome, and to balance prompts and rollouts? One student, an expert for
each of two tasks, {STEPS} steps of {BATCH} prompts with {GROUP} answers each, and the same prompts in every arm.

**Task.** Either step has two legal manners.

- *Arithmetic*: addition and subtraction of 1 to 3 digits, column by column.
- *List programs*: 1 to 3 operations on a list of digits.

**Models** are all Llamas of 2 layers and width 64 with one past: a base that learnt to work both out.

- The student went on from it on answers of which the more are wrong the harder the problem, 0.02 of the easiest and 0.7
  of the hardest, in both manners alike.
- An expert went on from the base on one task: it writes one manner in 0.97 of the steps, and {WRONG:.0%} of the answers
  that it learnt from are wrong, in every problem.

**Premise.** What an expert says of whole answers must disagree with their outcome. All of it is measured before any arm
runs, and is a gate:

- In the worse task a wrong answer must stand above a right one in at least 0.4 of the prompts with both, and at least a
  quarter of all such pairs must be the wrong way round.
- Student and experts must have room above them.
- There must be prompts that are never, sometimes and always solved.

**Arms.** Every arm with a teacher has the log-ratio gate.

- *OPD* is sampled reverse KL, averaged over each answer and then over answers, from the expert of the prompt's task.
- *Uni-OPD* has all three parts with the paper's numbers: prompts repeated by difficulty, as many right as wrong
  answers, and margins shifted up to {DELTA:g} nats a token (`mean`, `spread`). Its answers before training, 8 to each
  prompt, are in its costs.
- Three arms leave one part out.
- *Shift* and *mask* calibrate margins alone.
- The controls put something simpler in the shift's place: a *fixed bonus* of plus or minus {DELTA / 2:g} nats for right
  and wrong, a *normalised bonus* of {DELTA / 2:g} times GRPO's advantage, and the shift by *shuffled labels*, dealt
  anew within each prompt. The bonuses act, as margins do, only where a prompt has both outcomes.
- *GRPO* has the outcome and no teacher.

**Selection.** Each arm takes the best of the rates {TRIED} by accuracy on validation prompts under a seed of its own;
those that leave a part out take Uni-OPD's, shuffled labels the shift's. **Figures** are from 300 test prompts of either
task, four answers each at temperature 1.
""",
    discussion="""
## Why it came out so

**Calibrated margins help, and what helps is the outcome.** The shift raises OPD by five points, and nothing of that is
left when its labels are shuffled (within 0.8 points of OPD). But a fixed bonus, which looks at no margin, is two points
better than the shift, and GRPO's advantage, added, four.

The bonus is 0.2 nats a token wherever a prompt has both outcomes, as the specification asks; the shift moves by
`lam / 2`, 0.145 on average, and only where the margin is too small. So part of the gap may be the size of the reward,
which was not matched; none of it speaks for the margin.

That agrees with the one independent check that the specification knows of, in which the reward added directly did
better than margins.

**The balance of difficulty costs seven points.** It repeats prompts that the student solves sometimes, at the cost of
those it never solves, and these are where most is to be learnt: `python -m reproductions.uni_opd_levels` splits the
accuracies by difficulty.

With it the hardest arithmetic is right in 0.29 of the cases, without it in 0.45; on easy problems it costs two to six
points as well. A likely reason for that is that the balanced set has fewer different prompts in as many steps; it was
not tested apart.

A teacher's word teaches on prompts without a single right answer, which is what sets distillation apart from
reinforcement; the balance is made for the latter. In the paper the student's unsolved prompts may be out of the
teacher's reach too; here they are not.

**The balance of outcomes costs three points.** It drops about a third of the rollouts (`last_kept`), and with them
what the teacher says there. The denominator is fixed, as in the authors' code; Adam makes little of that, so the loss
is of data and not of step size. Topping up to equal numbers of kept rollouts was not tried.

**Shift or mask** is undecided: two points for the shift in the mean, at a third of the mask's rate.

**The outcome alone is best here.** GRPO gets 0.83, 12 points above the best arm with a teacher. The tasks are short
and six prompts of ten have both outcomes, so the reward is dense enough, and the experts are wrong in 0.3 of their
answers on purpose. So these figures say how the parts compare with each other, and nothing on whether to distil.

**What was chosen after looking.**

- Five sets of models were made before one passed the premise: weak experts, experts whose manner hardly mattered (5 to
  14 % of the pairs inverted), models that were right too seldom (32 to 36 %), then fewer wrong answers (18 %), then
  easier problems (22 to 25 %).
- The limits on always-solved prompts (0.02 to 0.01) and on the experts' accuracy (0.6 to 0.55) were lowered before the
  run; the models that ran pass the old ones too.
- Single runs of OPD, shift, Uni-OPD and fixed bonus on the earlier models were seen before the claims were written, and
  in one of them the bonus was ahead of the shift.
""",
    stages={
        **STAGES,
        "premise": STAGE,
        **{
            rate_stage(name): Stage(
                best_rate, {"recipe": distilled(ARMS[name]), "rates": list(RATES), "seed": 100}, models(name)
            )
            for name in TUNED
        },
    },
    gates=GATES,
    arms={name: arm(name) for name in ARMS},
    seeds=tuple(range(10)),
    imports=["reproductions.uni_opd"],
    metrics=[
        "test_accuracy",
        "test_accuracy_worst",
        *(f"test_accuracy_{task}" for task in TASKS),
        "test_pass_at_k",
        "test_length",
        "cpu_seconds",
        "sampled_tokens",
        *(f"{end}_{name}" for name in dict.fromkeys(LOGGED.values()) for end in ("first", "last")),
        "rate",
    ],
    claims=[
        better("main", "Uni-OPD gets more test problems right than OPD.", FULL, OPD),
        better("margins", "Without calibrated margins it gets fewer right.", FULL, "without margins"),
        better("balance", "Without the balance of outcomes it gets fewer right.", FULL, "without balance"),
        better("difficulty", "Without the balance of difficulty it gets fewer right.", FULL, "without difficulty"),
        better("mask", "The shift gets more right than the mask.", ONLY_SHIFT, "mask"),
        better("fixed bonus", "The shift gets more right than a fixed bonus of delta / 2.", ONLY_SHIFT, "fixed bonus"),
        better(
            "normalised bonus",
            "The shift gets more right than the group-normalised reward, added.",
            ONLY_SHIFT,
            "normalised bonus",
        ),
        better("labels", "The shift gets more right than one by shuffled labels.", ONLY_SHIFT, "shuffled labels"),
        *(
            better(f"main, {task}", f"Uni-OPD gets more right than OPD in {task}.", FULL, OPD, f"test_accuracy_{task}")
            for task in TASKS
        ),
        better("shift", "The shift alone gets more right than OPD.", ONLY_SHIFT, OPD),
        better("mask alone", "The mask alone gets more right than OPD.", "mask", OPD),
        better("GRPO", "Uni-OPD gets more right than GRPO.", FULL, "GRPO"),
        Claim(
            "shuffled",
            "Shuffled labels change OPD's accuracy by less than 2 points.",
            "test_accuracy",
            "higher",
            "shuffled labels",
            OPD,
            test="equivalent",
            margin=0.02,
        ),
    ],
    headline=("main", "margins", "balance", "difficulty", "mask", "fixed bonus", "normalised bonus", "labels"),
    smoke=Smoke(
        stages={
            **{
                name: {
                    "recipe": {
                        "steps": 2,
                        "batch": {"prompts": 16, "micro": 16},
                        "prompts": [{**rows, "size": 64} for rows in stage.params["recipe"]["prompts"]],
                        "evaluation": few(8, "validation"),
                    }
                }
                for name, stage in STAGES.items()
                if "recipe" in stage.params
            },
            "premise": {"size": 4},
            **{
                rate_stage(name): {
                    "recipe": FEW_STEPS,
                    "rates": [3e-4],
                }
                for name in TUNED
            },
        },
        arms={
            "recipe": FEW_STEPS,
            "test": few(4, "test", 16),
        },
        seeds=(0,),
    ),
)
