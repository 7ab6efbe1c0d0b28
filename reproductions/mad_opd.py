"""MAD-OPD (arXiv 2605.01347), the debate: a student learns from two teachers that debate what it was asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.api import assembled
from opd.evaluation import evaluate
from opd.recipe import parse_recipe
from opd.reproductions import Claim, Reproduction, Smoke, Stage, train
from opd.reproductions.definition import COSTS, Figures, merged
from opd.reproductions.training import filled
from reproductions.mad_opd_models import (
    CAP,
    CODES,
    OF_RATES,
    PARTS,
    PROBLEMS,
    SAVED,
    SEED_OF_RATES,
    SIZES,
    SLIP,
    STAGES,
    START,
    TEACHER,
    WRONG,
    at,
    recipe,
)
from reproductions.mad_opd_premise import GATES, STAGE, debate
from reproductions.on_policy import at_rate, best_rate
from reproductions.running_sum import figures_of

STEPS, BATCH, RATES = 150, 32, (1e-3, 3e-3)
TRIED = ", ".join(f"{rate:g}" for rate in RATES)
LEAST = 0.05
"""What is asked of a gain."""


def teacher(of: str, **own: Any) -> dict[str, Any]:
    return {"model": f"{{{TEACHER[of]}}}/{SAVED}", "template": "plain", "batch": 64, **own}


def writes(name: str) -> dict[str, Any]:
    return {"kind": "teacher", "teacher": name, "max_new_tokens": CAP}


MAD, OPD, MT, SEQ, UNIFORM, ONE, OTHER = (
    "MAD-OPD",
    "OPD",
    "MT-OPD",
    "MT-SeqKD",
    "equal weights",
    "one round",
    "another's debate",
)
ARMS: dict[str, dict[str, Any]] = {
    MAD: {},
    OPD: {"teacher": teacher("A")},
    MT: {"teacher": debate(0)},
    SEQ: {
        "teacher": [teacher("A", name="A"), teacher("B", name="B")],
        "rollout": {"kind": "mixture", "share": 0.7, "first": writes("A"), "second": writes("B")},
        "objective": ["sft"],
    },
    UNIFORM: {"teacher": debate(weighting="uniform")},
    ONE: {"teacher": debate(1)},
    "three rounds": {"teacher": debate(3)},
    OTHER: {"teacher": debate(about="other")},
}
"""What each changes of MAD-OPD."""
TUNED = (MAD, OPD, MT, SEQ)
OWN_RATES = ", ".join(TUNED)
"""Arms with a learning rate of their own; the others take MAD-OPD's."""
BEFORE, SOLO = "start", "teacher A"


def distilled(changes: Mapping[str, Any], start: str = START) -> dict[str, Any]:
    """MAD-OPD from the start; its learning rate is put in when it is known."""
    own = {
        "teacher": debate(),
        "prompts": at(f"{{{PROBLEMS}}}", "train"),
        "objective": ["reverse_kl"],
        "batch": {"prompts": BATCH, "micro": BATCH},
        "evaluation": {"every": STEPS},
    }
    block = merged(recipe(f"{{{start}}}/{SAVED}", STEPS, 0.0), own)
    # A teacher or a rollout is put in the place of the other, and not into it.
    return {**merged(block, changes), **{name: changes[name] for name in ("teacher", "rollout") if name in changes}}


# -- the jobs ----------------------------------------------------------------------------------------------------------


def judged(folder: Path, model: Path, inputs: Mapping[str, Path], *, size: int, seed: int) -> Figures:
    """Share of test problems that a model's samples at temperature 1 get right, `test_accuracy`, and by item."""
    own = {
        "prompts": at(f"{{{PROBLEMS}}}", "validation"),
        "objective": ["sft"],
        "evaluation": {"prompts": {**at(f"{{{PROBLEMS}}}", "test"), "limit": size}},
        "tracking": {"trackers": []},
        "seed": seed,
        "output": str(folder),
    }
    block = {**merged(recipe(str(model), 1, 0.0), own), "rollout": {"kind": "data"}}
    found = evaluate(assembled(parse_recipe(filled(block, inputs), "recipe of this test")))
    return {"test_accuracy": found.metrics["accuracy"], "items": {"test_accuracy": found.items["accuracy"]}}


def untrained(folder: Path, inputs: Mapping[str, Path], *, of: str, size: int, seed: int) -> Figures:
    """A model of a stage itself, which costs nothing more."""
    return {**dict.fromkeys(COSTS, 0.0), **judged(folder / "test", inputs[of] / SAVED, inputs, size=size, seed=seed)}


def trained(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], size: int, rate: str, seed: int
) -> Figures:
    """Train a student of one seed at the rate that a stage chose, and test it."""
    found = figures_of(inputs[rate])["rate"]
    models = {name: place for name, place in inputs.items() if name != rate}
    figures = train(folder, models, recipe=at_rate(recipe, found), seed=seed)
    return {**figures, **judged(folder / "test", folder / SAVED, inputs, size=size, seed=seed), "rate": found}


def rate_stage(name: str) -> str:
    return f"rate of {name if name in TUNED else MAD}"


def student_stage(name: str) -> str:
    return f"student of {name}"


def student(name: str) -> Stage:
    params = {"recipe": distilled(ARMS[name]), "size": SIZES["test"], "rate": rate_stage(name)}
    return Stage(trained, params, [START, PROBLEMS, *TEACHER.values(), rate_stage(name)], per_seed=True)


def itself(of: str) -> Stage:
    return Stage(untrained, {"of": of, "size": SIZES["test"]}, [of, PROBLEMS], per_seed=True)


def figured(folder: Path, inputs: Mapping[str, Path], *, of: str, seed: int) -> Figures:
    """What the job of an arm's student measured."""
    return figures_of(inputs[of])


def better(id: str, statement: str, method: str, baseline: str, margin: float = 0.0, note: str = "") -> Claim:
    return Claim(id, statement, "test_accuracy", "higher", method, baseline, margin=margin, note=note)


FEW: dict[str, Any] = {"steps": 2, "batch": {"prompts": 4, "micro": 4}, "evaluation": {"every": 0}}
"""Of the smoke run."""
FEW_WORDS: dict[str, Any] = {"teacher": {"weighting": "uniform"}}
"""Teachers of two steps write no tags."""
FEW_OF_MODELS = {"recipe": {"steps": 2, "batch": {"prompts": 8, "micro": 8}}}


def few(name: str) -> dict[str, Any]:
    """What the smoke run changes of an arm's recipe."""
    found = distilled(ARMS[name])["teacher"]
    debated = isinstance(found, Mapping) and found.get("kind") == "debate" and found["rounds"]
    return {**FEW, **(FEW_WORDS if debated else {})}


reproduction = Reproduction(
    title="MAD-OPD",
    introduction=f"""
Does a student learn more from two teachers that debate each problem first than from the better one, or from both
without a debate? One pair of teachers, a start for each seed, {STEPS} steps of {BATCH} replies, and the same problems
in the same order in every arm. This is the debate on a task of one turn; agents in environments, the paper's other
half, have an experiment of their own: `opd reproduce mad-opd-agents`.

**Task.** A problem has {PARTS} parts, each of one of {len(CODES)} codes and a digit, `u3v7u1:`, and its answer a digit
for each.

**Teachers.** Both have three layers of width 64. A knows code u and has {WRONG["A"]} of the ten digits of code v wrong,
B knows code v and has {WRONG["B"]} of code u wrong, always in the same way.

On other problems they *learnt to debate*: to say how sure they are, and to take from a transcript the word of the one
who knows the code. They are never shown a digit that neither proposed. What is tested is what training on a debate
does, and not whether debates come about.

**Premise.** A gate before any arm:

- Behind two rounds the teachers' texts are right at least 5 points more often than the better teacher alone, and nearly
  all have a tag.
- Every start has 10 to 45 of 100 validation problems right.

**Arms.** Debates are drawn at a temperature of 0.7, replies at 1.

- *MAD-OPD* is reverse KL to both teachers under two rounds, weighted by how sure they say they are, averaged over each
  reply and then over replies.
- *OPD* has teacher A alone.
- *MT-OPD* has both without a debate and with equal weights.
- *MT-SeqKD* fine-tunes on texts that A writes for seven of ten problems and B for the others.
- *Equal weights* keeps the debate and drops the confidences.
- *One round* and *three rounds* change the debate's length.
- In *another's debate* the teachers debate another problem than the one that they score.
- *Start* learnt from {SIZES["train"]:,} problems' worth of answers with {SLIP:.0%} of the digits drawn at random and is
  not trained further.
- *Teacher A* is the better teacher itself.

**Selection.** {OWN_RATES} take the better of the rates {TRIED} by accuracy on validation problems, from a start of a
seed of its own; the others take MAD-OPD's. **Figures** are samples at temperature 1 on {SIZES["test"]} test problems.
""",
    discussion="""
## Why it came out so

**The debate puts together what each teacher lacks.** Alone A is right on 0.43 of the problems and its student ends
where it is (0.42). Behind the debate both teachers are right on 0.98, and the student follows them to 0.994, at three
times the CPU seconds of a step with one teacher and twice as many scored tokens.

That a debate puts knowledge together was trained into these teachers; whether debates of language models do so is not
decided here.

**Two teachers without a debate gain ten points.** With equal weights the sum of both divergences pulls to what lies
between two teachers who are each wrong about the other's code, so MT-OPD ends at 0.52, and fine-tuning on texts of
both, which have the errors of both, at 0.38.

**The confidences cannot show anything here.** Behind two rounds both teachers say that they are 95 of 99 sure, so
their weights are equal and both arms are the same to the last digit. The claim was declared as a headline; since it can
come out in one way alone, it was moved to the appendix after the run. It takes teachers who disagree in the end.

**One round does as well as two (undecided).** A teacher that scores reads the transcript itself, and these learnt to
take the right word from proposals. A second round repeats what the first one holds.

**The debate of another problem destroys.** The same machinery takes the student from 0.27 to 0.04, since teachers take
from the transcript what belongs to another problem. So it is what the debate says that moves the student, and a
transcript that is put to the wrong prompt does harm.
""",
    stages={
        **STAGES,
        "premise": STAGE,
        **{
            rate_stage(name): Stage(
                best_rate,
                {"recipe": distilled(ARMS[name], OF_RATES[START]), "rates": list(RATES), "seed": SEED_OF_RATES},
                [OF_RATES[START], PROBLEMS, *TEACHER.values()],
            )
            for name in TUNED
        },
        student_stage(BEFORE): itself(START),
        student_stage(SOLO): itself(TEACHER["A"]),
        **{student_stage(name): student(name) for name in ARMS},
    },
    gates=GATES,
    arms={name: Stage(figured, {"of": student_stage(name)}, [student_stage(name)]) for name in (BEFORE, SOLO, *ARMS)},
    seeds=(0, 1, 2, 3, 4),
    imports=["reproductions.mad_opd"],
    metrics=["test_accuracy", "accuracy", "rate"],
    claims=[
        better(
            "main",
            "MAD-OPD gets at least 5 points more right than OPD from the better teacher.",
            MAD,
            OPD,
            margin=LEAST,
        ),
        better("MT-OPD", "MAD-OPD gets more right than both teachers without a debate.", MAD, MT),
        better("MT-SeqKD", "MAD-OPD gets more right than fine-tuning on both teachers' texts.", MAD, SEQ),
        better("ceiling", "The student of MAD-OPD gets more right than the better teacher alone.", MAD, SOLO),
        better("debate", "The debate alone, with equal weights, gives more right than no debate.", UNIFORM, MT),
        better("confidence", "Weights by confidence give more right than equal ones.", MAD, UNIFORM),
        better("rounds", "Two rounds give more right than one.", MAD, ONE),
        better(
            "another's debate",
            "With the debate of another problem the student gets no more right than its start (1 point is allowed).",
            BEFORE,
            OTHER,
            margin=-0.01,
        ),
    ],
    headline=("main", "MT-OPD", "MT-SeqKD", "ceiling", "debate", "rounds", "another's debate"),
    smoke=Smoke(
        stages={
            PROBLEMS: {"sizes": {"train": 20, "validation": 4, "test": 4}},
            **dict.fromkeys((*TEACHER.values(), START, OF_RATES[START]), FEW_OF_MODELS),
            "premise": {"size": 2},
            **{rate_stage(name): {"recipe": few(name), "rates": [1e-3]} for name in TUNED},
            **{student_stage(name): {"size": 4} for name in (BEFORE, SOLO)},
            **{student_stage(name): {"recipe": few(name), "size": 4} for name in ARMS},
        },
        seeds=(0,),
    ),
)
