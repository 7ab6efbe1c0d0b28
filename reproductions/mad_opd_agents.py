"""MAD-OPD (arXiv 2605.01347), agents: two teachers debate every state that the student gets into in an environment."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.api import assembled
from opd.language.episodes import TURN
from opd.recipe import parse_recipe
from opd.reproductions import Claim, Reproduction, Smoke, Stage, train
from opd.reproductions.definition import COSTS, Figures, merged
from opd.reproductions.training import filled
from opd.rollouts import Request
from reproductions import mad_opd_agents_controls  # noqa: F401  # its choice is there once it is imported
from reproductions.mad_opd_agents_machine import FAMILIES, FIRM, LATE, SPARE
from reproductions.mad_opd_agents_models import (
    AGENT,
    OF_RATES,
    REPAIRS,
    SAVED,
    SEED_OF_RATES,
    SIZES,
    STAGES,
    START,
    TEACHER,
    TRAIN,
    UNKNOWN,
    VALIDATION,
    alone_in,
    episodes,
    judged,
    model,
    recipe,
    supervised,
)
from reproductions.mad_opd_agents_premise import GATES, STAGE, debate
from reproductions.mad_opd_models import WRONG
from reproductions.on_policy import at_rate
from reproductions.running_sum import figures_of

STEPS, BATCH, RATES = 150, 6, (1e-3, 3e-3)
STATES = 300
"""Initial states that arms train on, again and again."""
TRIED = ", ".join(f"{rate:g}" for rate in RATES)
SHARE = 0.7
"""Of the episodes that teacher A plays for MT-SeqKD."""
CALLS = 30
"""Of a step of MT-SeqKD, about as many as in an arm's episodes."""
LEAST = 0.05
"""What is asked of a gain."""
MOST = len(FAMILIES) + SPARE
"""Calls of an episode."""
TEXTS = "teachers' episodes"

MAD, OPD, MT, SEQ, UNIFORM, ONE, GOLD, OTHER = (
    "MAD-OPD",
    "OPD",
    "MT-OPD",
    "MT-SeqKD",
    "equal weights",
    "one round",
    "expert's history",
    "another's debate",
)
ARMS: dict[str, dict[str, Any]] = {
    MAD: {},
    OPD: {"teacher": model(f"{{{TEACHER['A']}}}/{SAVED}", batch=64)},
    MT: {"teacher": debate(0)},
    SEQ: {},
    UNIFORM: {"teacher": debate(weighting="uniform")},
    ONE: {"teacher": debate(1)},
    GOLD: {"rollout": {**AGENT, "history": "data"}},
    OTHER: {"teacher": {**debate(), "kind": "debate_elsewhere"}},
}
"""What each changes of MAD-OPD; MT-SeqKD is fine-tuning."""
TUNED = (MAD, OPD, MT, SEQ)
OWN_RATES = ", ".join(TUNED)
"""Arms with a learning rate of their own; the others take MAD-OPD's."""
BEFORE, SOLO = "start", "teacher A"


def distilled(name: str, start: str = START) -> dict[str, Any]:
    """An arm from the start; its learning rate is put in when it is known."""
    if name == SEQ:
        return supervised(f"{{{start}}}/{SAVED}", TEXTS, STEPS, 0.0, CALLS)
    own = {
        "teacher": debate(),
        "prompts": episodes(STATES, TRAIN),
        "rollout": AGENT,
        "objective": ["jensen_shannon"],
        "batch": {"prompts": BATCH, "micro": 64},
        "evaluation": {"prompts": episodes(50, VALIDATION), "every": STEPS // 2},
    }
    # A teacher or a rollout is put in the place of the other, and not into it.
    return {**merged(recipe(f"{{{start}}}/{SAVED}", STEPS, 0.0), own), **ARMS[name]}


# -- the jobs ----------------------------------------------------------------------------------------------------------


def acted(folder: Path, inputs: Mapping[str, Path], *, size: int, each: int, share: float, seed: int) -> Figures:
    """Episodes that teachers play by themselves, `each` from `size` of the initial states that arms train on, A from a
    `share` of them and B from the others; every call with what was said before it in `folder/rows.jsonl`. And the
    shares that succeed."""
    of_a = set(random.Random(f"acted {seed}").sample(range(size), round(share * size)))
    rows: list[dict[str, Any]] = []
    figures: Figures = {}
    for name, mine in (("A", True), ("B", False)):
        block = alone_in(folder / name, f"{{{TEACHER[name]}}}/{SAVED}", episodes(size, TRAIN), seed)
        run = assembled(parse_recipe(filled(block, inputs), "recipe of these episodes"))
        chosen = [prompt for i, prompt in enumerate(run.held_out) if (i in of_a) == mine]
        settings = run.recipe.rollout
        try:
            made = run.rollout(Request(chosen, each, settings.budget, 0, settings, run.context))
        finally:
            run.rollout.close()
        assert made.rewards is not None
        for prompt in made.prompts:
            view = prompt.view(None)
            assert not isinstance(view, str)
            said = [{"role": one["role"], "content": one["content"]} for one in view]
            rows.append({"prompt": said, "response": prompt.fields[TURN]["said"]})
        won = [float(made.rewards[i]) for i, prompt in enumerate(made.prompts) if prompt.fields[TURN]["number"] == 1]
        figures[f"success_{name}"] = sum(won) / len(won)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps({"id": str(i), **row}) + "\n")
    return {**figures, "rows": float(len(rows))}


def untrained(folder: Path, inputs: Mapping[str, Path], *, of: str, size: int, seed: int) -> Figures:
    """A model of a stage itself, which costs nothing more."""
    found = judged(folder / "test", inputs[of] / SAVED, split="test", size=size, seed=seed)
    return {**dict.fromkeys(COSTS, 0.0), **found}


def trained_at(
    folder: Path, inputs: Mapping[str, Path], recipe: Mapping[str, Any], rate: float, split: str, size: int, seed: int
) -> Figures:
    """Train at a rate and play episodes of a split. Fine-tuning plays none beside itself, so it has no curve."""
    figures = train(folder, inputs, recipe=at_rate(recipe, rate), seed=seed)
    if recipe["rollout"]["kind"] == "data":
        figures = {name: figures[name] for name in COSTS}
    return {**figures, **judged(folder / split, folder / SAVED, split=split, size=size, seed=seed)}


def selected(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], rates: list[float], size: int, seed: int
) -> Figures:
    """Every rate once, with a seed that no arm has; the best by success in validation episodes."""
    found = {}
    for rate in rates:
        (folder / f"{rate:g}").mkdir()
        figures = trained_at(folder / f"{rate:g}", inputs, recipe, rate, "validation", size, seed)
        found[rate] = figures["validation_accuracy"]
    return {"rate": max(found, key=found.__getitem__), **{f"accuracy at {rate:g}": a for rate, a in found.items()}}


def trained(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], size: int, rate: str, seed: int
) -> Figures:
    """Train a student of one seed at the rate that a stage chose, and test it."""
    found = figures_of(inputs[rate])["rate"]
    places = {name: place for name, place in inputs.items() if name != rate}
    return {**trained_at(folder, places, recipe, found, "test", size, seed), "rate": found}


def figured(folder: Path, inputs: Mapping[str, Path], *, of: str, seed: int) -> Figures:
    """What the job of an arm's student measured."""
    return figures_of(inputs[of])


def rate_stage(name: str) -> str:
    return f"rate of {name if name in TUNED else MAD}"


def student_stage(name: str) -> str:
    return f"student of {name}"


def needed(name: str) -> list[str]:
    """Stages that an arm's training takes besides its start."""
    return [TEXTS] if name == SEQ else list(TEACHER.values())


def student(name: str) -> Stage:
    params = {"recipe": distilled(name), "size": SIZES["test"], "rate": rate_stage(name)}
    return Stage(trained, params, [START, *needed(name), rate_stage(name)], per_seed=True)


def selection(name: str) -> Stage:
    start = OF_RATES[START]
    params = {"recipe": distilled(name, start), "rates": list(RATES), "size": SIZES["validation"]}
    return Stage(selected, {**params, "seed": SEED_OF_RATES}, [start, *needed(name)])


def itself(of: str) -> Stage:
    return Stage(untrained, {"of": of, "size": SIZES["test"]}, [of], per_seed=True)


def better(id: str, statement: str, method: str, baseline: str, margin: float = 0.0, note: str = "") -> Claim:
    return Claim(id, statement, "test_accuracy", "higher", method, baseline, margin=margin, note=note)


FEW_OF_MODELS = {"recipe": {"steps": 2, "batch": {"prompts": 8, "micro": 8}}}
"""Of the smoke run."""


def few(name: str) -> dict[str, Any]:
    """What the smoke run changes of an arm's recipe; teachers of two steps write no tags."""
    if name == SEQ:
        return {"steps": 2, "batch": {"prompts": 4, "micro": 4}}
    found = distilled(name)["teacher"]
    debated = found.get("kind", "").startswith("debate") and found["rounds"]
    own = {
        "steps": 2,
        "batch": {"prompts": 2},
        "prompts": {"per_task": 8},
        "evaluation": {"every": 0, "prompts": {"per_task": 2}},
    }
    return {**own, **({"teacher": {"weighting": "uniform"}} if debated else {})}


DISCUSSION = """\
**An agent under a debate ends above both of its teachers.** A alone takes it to 0.58 and is itself right in 0.62 of
its episodes, since it cannot know family v; both at once without a debate give 0.62. What the two say behind a debate
takes the student to 0.945, and the debate about another state to nothing at all: it learns from what is said and not
from more text.

- **Weights by confidence** bring two points, where the texts differ in the end: in 30 of 100 debates. In nearly all of
  those the surer teacher is right.
- **A second round** shows no difference, though the teachers themselves gain by it: in the premise the worse succeeds
  in 0.76 of its episodes behind one round and in 0.85 behind two. The student learns nearly all there is from the
  first.
- **States that right calls lead to** teach no repair: 0.12 of the jams are freed, against 0.997 on its own states.
- Every arm took the upper rate of the two, so a still higher one may raise all.
- That two halves of a skill beat either half is by construction; teachers whose errors overlap are not tested here.
"""

reproduction = Reproduction(
    title="MAD-OPD with agents",
    introduction=f"""
Does an agent learn more from two teachers that debate every state it gets into than from the better one, or from both
without a debate? One pair of teachers, a start for each seed, {STEPS} steps of {BATCH} episodes, and the same {STATES}
initial states in the same order in every arm. The debate on a task of one turn is [MAD-OPD](mad-opd.md).

**Task.** A machine says its register and the tool that it wants, `3u`. The agent calls the tool with the digit which
the family's code makes of the register, `u9`, and that digit is then the register, `9v`. A wrong call jams it, `x`, and
only `r` frees it, with another register, `5v`.

Four right calls, two of each family of tools, within {MOST} are a success, so an episode has 4 to {MOST} steps and
allows for one wrong call that is mended.

**Teachers.** Both have three layers of width 64. A knows family u and has {WRONG["A"]} of the ten digits of v wrong, B
knows v and has {WRONG["B"]} of u wrong, always in the same way; both know how to mend.

In states of episodes that somebody clumsy played they *learnt to debate*: to say how often they are right about such a
tool, and behind a transcript to take the word of the one who knows. Of ten registers each teacher never gives up its
wrong beliefs about {FIRM}, and that about {LATE - FIRM} more only behind two rounds, so that what they say in the end
differs now and then.

They are never shown a call that neither proposed. What is tested is what training on a debate does to an agent, and not
whether debates come about.

**Premise.** Gates before any arm:

- Behind two rounds the worse teacher succeeds at least 5 points more often than the better one alone.
- The texts of each teacher and round nearly all have a tag.
- The last texts differ in at least 5 of 100 debates, since otherwise weights change nothing.
- Every start succeeds in 10 to 45 of 100 validation episodes.

**Arms.** Debates are drawn at a temperature of 0.7, calls at 1.

- *MAD-OPD* is the Jensen-Shannon divergence to both teachers under two rounds about each state, weighted by how sure
  they say they are, averaged over each call and then over calls.
- *OPD* has teacher A alone.
- *MT-OPD* has both without a debate and with equal weights.
- *MT-SeqKD* fine-tunes on episodes that A plays for seven of ten initial states and B for the others, {CALLS} calls a
  step.
- *Equal weights* keeps the debate and drops the confidences.
- *One round* shortens the debate.
- With *expert's history* the student answers states that right calls lead to, and its own calls are not played.
- In *another's debate* the teachers debate the same tool with another register than the one that they score.
- *Start* learnt from 400 episodes of somebody who calls with any digit where the register is one of {len(UNKNOWN)} of
  ten, and frees a jammed machine with a probability of {REPAIRS:g}; it is not trained further.
- *Teacher A* is the better teacher itself.

**Selection.** {OWN_RATES} take the better of the rates {TRIED} by success in {SIZES["validation"]} validation episodes,
from a start of a seed of its own; the others take MAD-OPD's. **Figures** are the shares of {SIZES["test"]} test
episodes, sampled at temperature 1, that succeed; `test_repairs` is the share of jams that the next call frees.
""",
    discussion=DISCUSSION,
    stages={
        **STAGES,
        "premise": STAGE,
        TEXTS: Stage(
            acted, {"size": STATES, "each": STEPS * BATCH // STATES, "share": SHARE, "seed": 0}, list(TEACHER.values())
        ),
        **{rate_stage(name): selection(name) for name in TUNED},
        student_stage(BEFORE): itself(START),
        student_stage(SOLO): itself(TEACHER["A"]),
        **{student_stage(name): student(name) for name in ARMS},
    },
    gates=GATES,
    arms={name: Stage(figured, {"of": student_stage(name)}, [student_stage(name)]) for name in (BEFORE, SOLO, *ARMS)},
    seeds=(0, 1, 2, 3, 4),
    imports=["reproductions.mad_opd_agents"],
    metrics=["test_accuracy", "test_repairs", "accuracy", "rate"],
    claims=[
        better(
            "main",
            "MAD-OPD succeeds at least 5 points more often than OPD from the better teacher.",
            MAD,
            OPD,
            margin=LEAST,
        ),
        better("MT-SeqKD", "MAD-OPD succeeds more often than fine-tuning on both teachers' episodes.", MAD, SEQ),
        better("ceiling", "The student of MAD-OPD succeeds more often than the better teacher alone.", MAD, SOLO),
        better("debate", "The debate alone, with equal weights, gives more successes than no debate.", UNIFORM, MT),
        better("confidence", "Weights by confidence give more successes than equal ones.", MAD, UNIFORM),
        better("rounds", "Two rounds give more successes than one.", MAD, ONE),
        better("step level", "States of the student's own history teach more than those of right calls.", MAD, GOLD),
        better(
            "another's debate",
            "With the debate of another state the student succeeds no more often than its start (1 point is allowed).",
            BEFORE,
            OTHER,
            margin=-0.01,
        ),
        better("MT-OPD", "MAD-OPD succeeds more often than both teachers without a debate.", MAD, MT),
    ],
    headline=(
        "main",
        "MT-SeqKD",
        "ceiling",
        "debate",
        "confidence",
        "rounds",
        "step level",
        "another's debate",
    ),
    smoke=Smoke(
        stages={
            "demonstrations": {"episodes": 8},
            **{f"lessons of {name}": {"size": 40} for name in TEACHER},
            **dict.fromkeys(TEACHER.values(), FEW_OF_MODELS),
            **{name: {**FEW_OF_MODELS, "size": 2} for name in (START, OF_RATES[START])},
            "premise": {"size": 2},
            TEXTS: {"size": 8, "each": 1},
            **{rate_stage(name): {"recipe": few(name), "rates": [1e-3], "size": 2} for name in TUNED},
            **{student_stage(name): {"size": 4} for name in (BEFORE, SOLO)},
            **{student_stage(name): {"recipe": few(name), "size": 4} for name in ARMS},
        },
        seeds=(0,),
    ),
)
