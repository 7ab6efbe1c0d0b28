"""Draft-OPD (arXiv 2605.29343): a draft model learns on the blocks that it proposed, accepted or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opd.reproductions import Claim, Reproduction, Smoke, Stage
from reproductions.draft_opd_models import ANSWERS, DRAFTER, STAGES, TARGET, TEXTS
from reproductions.draft_opd_premise import GATES, premise, room
from reproductions.draft_opd_training import (
    BATCH,
    GREEDY,
    MISPLACED,
    PER_TEXT,
    SAMPLED,
    SUPERVISED,
    best_of,
    best_rate,
    going_on,
    new,
    started,
    trained,
    untouched,
)

BEFORE, START_RATE = 3000, 2e-3
"""Updates of supervised training before any arm, and their learning rate."""
STEPS, RATES = 120, (2e-4, 6e-4, 2e-3)
EQUAL_CPU = 2.5
"""Updates of supervised training that take the CPU seconds of one of Draft-OPD."""
VALIDATION, TEST = 400, 400
TRIED = ", ".join(f"{rate:g}" for rate in RATES)
START, START_OF_RATES = "start", "start of rates"

OPD, SFT, LONGER, OWN = "Draft-OPD", "SFT, equal updates", "SFT, equal CPU", "self-distilled"
RANDOM, FROZEN, STOOD = "random anchors", "frozen record", "accepted alone"
FORWARD, REVERSE, PLAIN, TOKEN = "all forward", "all reverse", "no decay", "sampled token"
BEFORE_ARMS, HARMED, SOFT = "before", "misplaced teacher", "soft labels"
CORRECTED, RANDOM_STOOD = "with the correction", "random anchors of what stood"
SUPERVISED_BEST, SINGLE = "best supervised", "better single direction"


def streams(accepted: Mapping[str, Any] | None = None, rejected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The objectives of the two streams, with what is changed of each."""
    return {
        "objective": [
            {"kind": "accepted", "weight": 0.5, **(accepted or {})},
            {"kind": "rejected", "decay": 0.8, "weight": 0.5, **(rejected or {})},
        ]
    }


def at(**rollout: Any) -> dict[str, Any]:
    """Draft-OPD with another rollout."""
    return {**streams(), "rollout": rollout}


ARMS: dict[str, dict[str, Any]] = {
    OPD: streams(),
    SFT: SUPERVISED,
    LONGER: SUPERVISED,
    OWN: SUPERVISED,
    SOFT: {"objective": [{"kind": "accepted"}], "rollout": {"slots": "text"}},
    FROZEN: at(proposer="start"),
    RANDOM: at(anchors="random", moved="both"),
    RANDOM_STOOD: at(anchors="random"),
    STOOD: {"objective": [{"kind": "accepted"}]},
    CORRECTED: {"objective": [{"kind": "accepted", "correction": True}]},
    FORWARD: streams(rejected={"kl": "forward_kl"}),
    REVERSE: streams(accepted={"kl": "reverse_kl"}),
    PLAIN: streams(rejected={"decay": 1.0}),
    TOKEN: {"objective": [{"kind": "pooled"}]},
    HARMED: at(kind=MISPLACED),
}
"""What each says of rollout and objective."""
OLD_TEXTS = (SFT, LONGER)
"""Arms on the texts of the supervised training before; the others are on new ones."""
TUNED = (OPD, SFT, OWN, STOOD, FORWARD, REVERSE, TOKEN)
RATE_OF = {LONGER: SFT, CORRECTED: STOOD, SOFT: FORWARD}
"""Whose learning rate an arm takes that has none of its own; the others take Draft-OPD's."""
FEWER = {SOFT: 3, CORRECTED: 3, RANDOM_STOOD: 3, HARMED: 3}
"""Seeds of arms that no headline claim is about."""
BEST = {SUPERVISED_BEST: (SFT, LONGER, OWN), SINGLE: (FORWARD, REVERSE)}
"""Of each seed that drafter of these which is the best on validation prompts."""


FEW: dict[str, Any] = {
    "steps": 2,
    "batch": {"prompts": 4, "micro": 4},
    "evaluation": {"prompts": {"limit": 2}, "max_new_tokens": 8},
}
"""Of a recipe, in the smoke run."""
SHORT = {"tokens": 8}
"""Of a measurement, in the smoke run."""


def block(name: str, start: str) -> dict[str, Any]:
    """An arm's recipe, without its learning rate."""
    steps = round(STEPS * (EQUAL_CPU if name == LONGER else 1))
    return going_on(start, steps, "taught" if name in OLD_TEXTS else "new", ARMS[name])


def rate_stage(name: str) -> str:
    return f"rate of {name if name in TUNED else RATE_OF.get(name, OPD)}"


def drafter(name: str) -> str:
    return f"drafter of {name}"


GIVEN = [TEXTS, TARGET, ANSWERS]


def rates(name: str) -> Stage:
    params = {"recipe": block(name, START_OF_RATES), "rates": list(RATES), "size": VALIDATION, "seed": 100}
    return Stage(best_rate, params, [*GIVEN, START_OF_RATES])


def training(name: str) -> Stage:
    params = {"recipe": block(name, START), "rate": rate_stage(name), "validation": VALIDATION, "test": TEST}
    return Stage(trained, params, [*GIVEN, START, rate_stage(name)], per_seed=True, seeds=FEWER.get(name))


def shown(names: Sequence[str]) -> Stage:
    of = [drafter(name) for name in names]
    return Stage(best_of, {"of": of}, of, seeds=FEWER.get(names[0]))


OF_START = {"recipe": new(BEFORE, START_RATE), "size": VALIDATION}
T0, T1 = f"test_{GREEDY}", f"test_{SAMPLED}"


def longer(id: str, statement: str, baseline: str, metric: str = T1, method: str = OPD) -> Claim:
    return Claim(id, statement, metric, "higher", method, baseline)


HEADLINE = [
    longer(
        "main",
        "Draft-OPD's blocks stand longer than those of the best supervised drafter, in drawn texts.",
        SUPERVISED_BEST,
    ),
    longer("main, greedy", "So they do in greedy texts.", SUPERVISED_BEST, T0),
    longer("anchors", "They stand longer than after training at random anchors.", RANDOM),
    longer("rejected", "They stand longer than without the rejected stream.", STOOD),
    longer("directions", "They stand longer than with either direction alone.", SINGLE),
    longer("on-policy", "They stand longer than after training on blocks of the drafter as it began.", FROZEN),
    longer("decay", "They stand longer with a decay of 0.8 than without one.", PLAIN),
    longer("whole", "They stand longer than after training on one token of each slot.", TOKEN),
]


def greedy_too(claim: Claim) -> Claim:
    return replace(claim, id=f"{claim.id}, greedy", statement=f"{claim.statement[:-1]} (greedy texts).", metric=T0)


DRAWN_ONLY = [
    longer("above the start", "They stand longer than before.", BEFORE_ARMS),
    *(
        longer(f"above {name}", f"They stand longer than those of {name}.", name)
        for name in (SFT, LONGER, OWN, SOFT, FORWARD, REVERSE, CORRECTED, RANDOM_STOOD)
    ),
    longer("plateau", "More supervised training makes them stand longer.", BEFORE_ARMS, method=LONGER),
    longer("harm", "A teacher that speaks of another block does harm.", HARMED, method=BEFORE_ARMS),
]
OTHERS = [
    *(greedy_too(claim) for claim in HEADLINE if not claim.id.startswith("main")),
    *(each for claim in DRAWN_ONLY for each in (claim, greedy_too(claim))),
]

reproduction = Reproduction(
    title="Draft-OPD",
    introduction=f"""
Does a draft model that has learnt all that supervised training gives it go on learning from the blocks that it
proposed itself? One target, a drafter for each seed at the end of its supervised training, {STEPS} updates of
{BATCH} texts from there, and in every arm the same texts but where their change is what is asked.

**Target.** A Llama of 4 layers and width 96 (0.47M parameters), trained on texts drawn in code: programs on four
registers (60 %) and facts about 48 things (40 %), whose wording is drawn. **Drafter.** DFlash with one layer and
blocks of {DRAFTER["block"]}, that is {DRAFTER["block"] - 1} proposals; features of layers 0, 1 and 2. It learns
{BEFORE:,} updates of cross-entropy on 2,500 texts of the target, {PER_TEXT} anchors of each, slots weighted by
`exp(-(k - 1) / 4)`.

**Measure.** Acceptance length: tokens that a verifying pass of the target adds, of speculative decoding on {TEST}
test prompts, greedy (temperature 0) and drawn (1). Drawn texts are the same for all arms of a seed, greedy ones for
all arms. Where texts are lossless nothing but speed can change, so tests hold losslessness and no claim is about
it.

**Premise.** Drawn texts decide. It is measured before any other arm runs, and is a gate that all seeds must pass:

- Acceptance length is between 0.3 and 0.6 of the block.
- The last quarter of supervised training gains less than 2 %.
- Taking it up again with a fresh optimiser and schedule gains less than 1 %, since the end of a cosine looks like a
  plateau whatever lies behind it.
- There is room: one of the arms gains 2 % while rates are chosen.

The same was asked of greedy texts at first, and failed: there blocks stand for 0.61 to 0.64 of their length, and from a
new start four seeds moved by -0.8 to 3.1 % on one plateau (drawn texts by 0.1 to 0.4 %). Greedy texts hang on near ties
of the target. So headline claims are about drawn texts, but for one; the others about greedy texts are in the appendix.

**Arms.** All begin with a fresh optimiser.

- *Draft-OPD* has forward KL where blocks stood and reverse KL, with a decay of 0.8, where they did not, at the anchors
  of speculative decoding with the drafter as it is. Its texts are the target's answers to 3,000 new prompts, drawn at a
  temperature of 1, each once.
- *SFT, equal updates* and *equal CPU* go on with the supervised training and its texts; *self-distilled* does so with
  the new texts.
- *Soft labels* has forward KL on the new texts at Draft-OPD's anchors.
- *{FROZEN}* takes the blocks of the drafter as it began.
- *{RANDOM}* has the verified segments in another order at other places; *{RANDOM} of what stood* keeps the rejected
  stream where it was, as the authors' code has it.
- *{STOOD}* has no rejected stream; *with the correction* puts the slot that the target corrected into the accepted one.
- *{FORWARD}* and *{REVERSE}* have one direction, *{PLAIN}* has a decay of 1, *{TOKEN}* the authors' surrogate, pooled
  over both streams.
- With the *{HARMED}* each block is taught by what belongs to the next: it must harm.
- *{BEFORE_ARMS}* is the start.
- *{SUPERVISED_BEST}* and *{SINGLE}* are, for each seed, the best on validation prompts of the first three supervised
  arms, and of the two single directions.

**Selection.** Arms take the best of the rates {TRIED} by the acceptance lengths on validation prompts, from a start
and a seed of their own; those that change neither loss nor data of Draft-OPD take its rate. All rates fall by a
cosine to a tenth.
""",
    discussion="""
## Why it came out so

**Nothing is decided among eight claims with five seeds.** Five of them are decided each by itself, and 7 to 12
seeds would decide these together. What follows reads means.

**Its own blocks of now seem to matter.** Training on the blocks of the drafter as it began leaves drawn texts at
3.425 tokens a pass, below the 3.468 of the start, and greedy ones at 4.755 against 5.079: rejections that the
drafter has unlearnt go on being punished. Random anchors gain nothing either (3.454). This is the part of the paper
that holds best here.

**The mixture of directions does not look like what helps.** Draft-OPD gains 1 % in drawn texts (3.504) and nothing in
greedy ones (5.061). Three other arms, in drawn and in greedy texts:

- Forward KL in both streams gets 3.536 and 5.313.
- One token of each slot gets 3.558 and 5.299.
- The accepted stream with the corrected slot, no rejected stream at all, gets 3.577 and 5.268 (three seeds).

These have in common that the slot at which the target disagreed is taught the target's own token. In the paper's text
that slot has reverse KL alone, which takes mass from the drafter's mode and leaves open where it goes. The authors'
code teaches it.

**The rejected stream** adds 0.009 to the accepted one alone in drawn texts and costs 0.22 in greedy ones. A decay
of 0.8 is worth 0.016.

**Greedy texts** hang on near ties of the target: arms that differ by 0.01 in drawn texts differ by 0.1 there, and
one seed alone moves by 3 % when training is taken up again. Five seeds do not tell much from nothing there.

**What was chosen after looking.** The gates asked the same of greedy texts first, and failed; headline claims and
gates were then moved to drawn texts, before any arm but the tuning of rates had run. In that tuning one token of
each slot had been the best arm already. The target was made anew twice before, in pilots that the log tells of.
""",
    stages={
        **STAGES,
        START_OF_RATES: Stage(started, {**OF_START, "seed": 100}, GIVEN),
        START: Stage(started, OF_START, GIVEN, per_seed=True),
        **{rate_stage(name): rates(name) for name in TUNED},
        "room": Stage(
            room,
            {"start": START_OF_RATES, "of": [rate_stage(name) for name in TUNED]},
            [START_OF_RATES, *(rate_stage(name) for name in TUNED)],
            version=2,
        ),
        drafter(BEFORE_ARMS): Stage(
            untouched, {"start": START, "validation": VALIDATION, "test": TEST}, [*GIVEN, START], per_seed=True
        ),
        **{drafter(name): training(name) for name in ARMS},
        "premise": Stage(
            premise, {"start": START, "again": drafter(SFT)}, [START, drafter(SFT)], per_seed=True, version=2
        ),
    },
    gates=GATES,
    arms={name: shown(names) for name, names in ({name: (name,) for name in (BEFORE_ARMS, *ARMS)} | BEST).items()},
    seeds=(0, 1, 2, 3, 4),
    imports=["reproductions.draft_opd"],
    metrics=[T0, T1, f"validation_{GREEDY}", f"validation_{SAMPLED}", "rate"],
    claims=[*HEADLINE, *OTHERS],
    headline=[claim.id for claim in HEADLINE],
    smoke=Smoke(
        stages={
            TEXTS: {"sizes": {"train": 128, "taught": 32, "new": 32, "validation": 8, "test": 8}},
            TARGET: {"recipe": {"steps": 8}},
            START_OF_RATES: {"recipe": FEW | {"steps": 8}, "size": 2, **SHORT},
            START: {"recipe": FEW | {"steps": 8}, "size": 2, **SHORT},
            **{rate_stage(name): {"recipe": FEW, "rates": [6e-4], "size": 2, **SHORT} for name in TUNED},
            drafter(BEFORE_ARMS): {"validation": 2, "test": 2, **SHORT},
            **{drafter(name): {"recipe": FEW, "validation": 2, "test": 2, **SHORT} for name in ARMS},
        },
    ),
)
