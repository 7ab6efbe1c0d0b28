"""The models of Lightning OPD's experiment: teachers that write the same sums in different dialects, students that were
fine-tuned on what one of them wrote, and stores of what those students wrote.

The base learnt short sums, and then too few long ones; few batches of a teacher's texts leave the student right in a
third to a half of its samples. The teachers are that base after many more steps, each on solutions in its dialect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from opd.reproductions import Stage, train
from opd.reproductions.definition import merged
from reproductions.lightning_opd_jobs import skills, written
from reproductions.running_sum import new_model, prompts, recipe

SHORT, TERMS, BUDGET = (4, 7), (8, 12), 80
"""Digits of the sums that the base learnt first, and of all others; and most new tokens: the longest answer has 69."""
SHORT_STEPS, BASE_STEPS, TEACHER_STEPS, DIALECT_STEPS = 800, 400, 1600, 200
SFT_STEPS, SFT_BATCH, SFT_RATE = 100, 64, 2e-3
STEPS, BATCH = 200, 32
SIZE, HELD_OUT = 3200, 256
"""Problems that are trained on, two passes as in the paper; and problems of a store that are only measured."""
SHARES = {"A": 0.1, "A2": 0.1, "B": 0.9}
"""Share of the swapped writing of a step in each teacher's dialect, `b+a=c` in place of `a+b=c`."""
ANY: dict[str, Any] = {"task": {"formats": {"sum": 0.4, "swapped": 0.4, "result": 0.2}}}
"""What base and teachers learnt before a dialect: neither is nearer to it."""
BETAS = {"betas": [0.9, 0.98]}
"""Of AdamW, as in the paper's code."""
SAVED = "run/student"
BASE = "base"


def dialect(share: float) -> dict[str, Any]:
    return {"task": {"formats": {"sum": 0.9 * (1 - share), "swapped": 0.9 * share, "result": 0.1}}}


def teacher(name: str) -> str:
    return f"teacher {name}"


def texts(name: str) -> str:
    return f"written by {name}"


def sft(name: str) -> str:
    return f"SFT {name}"


def store(name: str) -> str:
    return f"store {name}"


# -- recipes -----------------------------------------------------------------------------------------------------------


def supervised(
    model: str,
    steps: int,
    formats: Mapping[str, Any],
    rate: float,
    kind: str = "cosine",
    terms: tuple[int, int] = TERMS,
) -> dict[str, Any]:
    """Fine-tuning on reference solutions."""
    own = {
        "prompts": formats,
        "rollout": {"kind": "data"},
        "objective": ["sft"],
        "update": {"learning_rate": {"kind": kind}, **BETAS},
        "batch": {"prompts": 64, "micro": 64},
        "evaluation": {"prompts": formats, "greedy": True, "every": steps, "alarm": None},
        "checkpoint": {"every": 0},
    }
    return merged(recipe(model, terms, BUDGET, steps, rate), own)


def writing(by: str) -> dict[str, Any]:
    """What `opd rollout` needs to have a teacher write the fine-tuning data."""
    block = recipe(f"{{{BASE}}}/{SAVED}", TERMS, BUDGET, 1, 1e-3, f"{{{teacher(by)}}}/{SAVED}")
    own = {"rollout": {"kind": "teacher"}, "prompts": {"size": SFT_STEPS * SFT_BATCH}, "objective": ["sft"]}
    return merged(block, own)


def fine_tuning(of: str, data: str, steps: int, rate: float, batch: int) -> dict[str, Any]:
    """Supervised fine-tuning on what a teacher wrote; its saved student says which teacher that was."""
    own = {
        "rollout": stored(data),
        "prompts": {"size": SFT_STEPS * SFT_BATCH},
        "objective": ["sft"],
        "evaluation": {"prompts": {"size": 512}, "every": 0, "greedy": True, "alarm": None},
        "update": BETAS,
        "checkpoint": {"every": 0},
    }
    block = recipe(of, TERMS, BUDGET, steps, rate, batch={"prompts": batch, "micro": batch})
    return merged(block, own)


def stored(stage: str) -> dict[str, Any]:
    return {"kind": "stored", "path": f"{{{stage}}}/store"}


def live(of: str, asked: str) -> dict[str, Any]:
    """The online arm: the student writes now and the teacher is asked now. Its learning rate is put in later."""
    block = recipe(f"{{{of}}}/{SAVED}", TERMS, BUDGET, STEPS, 0.0, f"{{{teacher(asked)}}}/{SAVED}")
    own = {
        "prompts": prompts(TERMS, SIZE + HELD_OUT, "train", seed=1),
        "objective": [{"kind": "lightning"}],
        "reduction": "sequence_mean",
        "batch": {"prompts": BATCH, "micro": BATCH},
        "evaluation": {"prompts": [], "held_out": HELD_OUT, "every": STEPS // 2, "alarm": None},
        "update": BETAS,
        "checkpoint": {"every": 0},
    }
    return merged(block, own)


def offline(of: str, place: str, targets: str, consistent: bool = True, **changes: Any) -> dict[str, Any]:
    """The same objective on a store of this student's: no teacher is loaded."""
    answers = {**stored(place), "targets": targets, "consistency": "required" if consistent else "ignored"}
    return merged(live(of, targets), {"rollout": stored(place), "teacher": [answers], **changes})


# -- stages ------------------------------------------------------------------------------------------------------------


def fine_tuned(by: str, seed: int | None = None, seeds: int | None = None) -> Stage:
    """A student of a teacher, of one seed or of the first few."""
    block = fine_tuning(f"{{{BASE}}}/{SAVED}", texts(by), SFT_STEPS, SFT_RATE, SFT_BATCH)
    return of_seed(Stage(train, {"recipe": block}, [BASE, texts(by)], per_seed=True, seeds=seeds), seed)


def store_of(
    of: str, scored_by: Mapping[str, Mapping[str, Any]], seed: int | None = None, seeds: int | None = None
) -> Stage:
    """The rollouts of a fine-tuned student with the answers of several teachers (name of the targets to teacher and
    options)."""
    asked = list(dict.fromkeys(str(options["teacher"]) for options in scored_by.values()))
    params = {"recipe": live(of, asked[0]), "scored_by": scored_by}
    return of_seed(Stage(written, params, [of, *map(teacher, asked)], per_seed=True, seeds=seeds), seed)


def of_seed(stage: Stage, seed: int | None) -> Stage:
    """A stage of every seed, or of one that no arm has."""
    return stage if seed is None else replace(stage.overridden({"seed": seed}), per_seed=False)


TEACHERS = [teacher(name) for name in SHARES]
TEACHER_TEST = {"prompts": prompts(TERMS, 400, "validation", seed=2), "max_new_tokens": BUDGET, "samples": 0, "k": 2}


MODELS: dict[str, Stage] = {
    "new": Stage(new_model, {"width": 64, "layers": 2, "heads": 4, "seed": 0}),
    "short": Stage(
        train, {"recipe": supervised("{new}/model", SHORT_STEPS, ANY, 3e-3, terms=SHORT), "seed": 0}, ["new"]
    ),
    BASE: Stage(
        train, {"recipe": supervised(f"{{short}}/{SAVED}", BASE_STEPS, ANY, 3e-3, "constant"), "seed": 1}, ["short"]
    ),
    "teacher": Stage(train, {"recipe": supervised(f"{{{BASE}}}/{SAVED}", TEACHER_STEPS, ANY, 3e-3), "seed": 2}, [BASE]),
    **{
        teacher(name): Stage(
            train,
            {"recipe": supervised(f"{{teacher}}/{SAVED}", DIALECT_STEPS, dialect(share), 1e-3), "seed": 3 + i},
            ["teacher"],
        )
        for i, (name, share) in enumerate(SHARES.items())
    },
    "teachers": Stage(skills, {"test": TEACHER_TEST, "seed": 0}, TEACHERS),
    **{texts(name): Stage(written, {"recipe": writing(name), "seed": 0}, [BASE, teacher(name)]) for name in ("A", "B")},
}
"""Base, teachers and the fine-tuning data: what all seeds share."""
