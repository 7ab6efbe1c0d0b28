"""The models of the reproduction of Prune-OPD: a student that changes its manner on the way, and two teachers.

A running sum is worked off on a list of digits, whose first two become one in each step. In the *plain* manner a step
is the sum and the new list, `2+8=04688214;`. In the *thorough* manner a step restates the list, swaps the summands and
ends with a log of all digits that were summed in this manner, the last first: `627:2+6=87:6206;`. The log grows while
the list shrinks, so that steps stay long.

All go over from the plain manner to the thorough one on the way, equally often, and stay there. The student is right
in the thorough manner, and of its plain sums some are wrong by one. Teacher D has every plain sum right and is lost
in the thorough manner, where it writes any digit: a teacher that helps up to a point of its student's rollouts and
not beyond. That nobody minds the change of manner is what makes it last: a teacher that never changes (what was tried
first) has the student unlearn the change within five to sixty steps, and nothing drifts any more. Teacher C is right
in both.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.language.creation import create_model, task_tokenizer
from opd.procedural.running_sum import RunningSum
from opd.reproductions import Stage, train
from opd.reproductions.definition import Figures, merged
from reproductions.running_sum import recipe

TERMS, TAUGHT, SHORT_TERMS = (7, 8), (6, 8), (3, 6)
"""Digits of the problems that are distilled and measured on, the length classes; of those that student and teachers
learnt from; and of those on which the base learns to add."""
CAP = 160
"""Most new tokens: more than the longest answer to 8 digits, which has 126."""
SWITCH = {"hazard": 0.45, "first": 2}
"""From the third step on, so many go over to the thorough manner with each step. It is less than half, so that greedy
answers stay plain and show what a teacher knows."""
SLIP = 0.15
SIZE = 8000


def solution(digits: str, hazard: float, first: int, slip: float, lost: bool, rng: random.Random) -> str:
    """One written solution.

    Args:
        digits: of the problem.
        hazard: probability, at each step from step `first` on (from 0), of going over to the thorough manner for good.
        slip: probability that a sum in the plain manner is one too high or too low, modulo 10; what follows, and the
            answer, are worked out from the wrong sum.
        lost: every digit of the thorough manner, and of the answer behind it, is any digit.
    """
    state, log, steps, thorough = digits, "", [], False
    while len(state) > 1:
        a, b, rest = int(state[0]), int(state[1]), state[2:]
        thorough = thorough or (len(steps) >= first and rng.random() < hazard)
        c = (a + b) % 10
        if thorough:
            log = f"{a}{b}{log}"
            step = f"{state}:{b}+{a}={c}{rest}:{log};"
            steps.append(re.sub(r"\d", lambda _: str(rng.randrange(10)), step) if lost else step)
        else:
            c = (c + rng.choice((1, 9))) % 10 if rng.random() < slip else c
            steps.append(f"{a}+{b}={c}{rest};")
        state = f"{c}{rest}"
    return "".join(steps) + "#" + (str(rng.randrange(10)) if lost and thorough else state)


def written(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    terms: tuple[int, int],
    hazard: float,
    first: int,
    slip: float,
    lost: bool,
    size: int,
    seed: int,
) -> Figures:
    """Solutions to `size` training problems, in `folder/rows.jsonl`; the figures are shares and lengths in tokens."""
    rng, lengths, wrong = random.Random(seed), [], 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for example in RunningSum(terms=terms).examples(size, 0, "train"):
            text = solution(example.prompt[:-1], hazard, first, slip, lost, rng)
            wrong += text.split("#")[1] != example.answer
            lengths.append(len(text) + 1)
            row = {"id": example.id, "prompt": example.prompt, "answer": example.answer, "response": text}
            file.write(json.dumps(row) + "\n")
    lengths.sort()
    return {"wrong": wrong / size, "length": sum(lengths) / size, "length_p90": float(lengths[int(0.9 * size)])}


def blank(folder: Path, inputs: Mapping[str, Path], *, seed: int) -> Figures:
    """Two layers of width 64 with random weights and the task's tokenizer, in `folder/model`."""
    create_model(
        folder / "model", task_tokenizer("running_sum"), width=64, layers=2, heads=4, feed_forward=128, seed=seed
    )
    return {}


def supervised(model: str, rows: str, terms: tuple[int, int], steps: int, rate: float) -> dict[str, Any]:
    """Fine-tuning on the solutions of a stage; held-out problems are solved with new tokens to spare."""
    changes = {"rollout": {"kind": "data"}, "objective": ["sft"], "batch": {"prompts": 64, "micro": 64}}
    block = recipe(model, terms, CAP, steps, rate, checkpoint={"every": 0}, **changes)
    return {**block, "prompts": {"kind": "file", "path": f"{{{rows}}}/rows.jsonl", "answer": "answer"}}


def rows(terms: tuple[int, int], slip: float, hazard: float, seed: int, lost: bool = False) -> Stage:
    own = {"terms": list(terms), "slip": slip, "lost": lost, "size": SIZE, "seed": seed}
    params = merged({**SWITCH, "hazard": hazard}, own)
    return Stage(written, params, version=2)


def trained(model: str, of: str, data: str, terms: tuple[int, int], steps: int, rate: float) -> Stage:
    return Stage(train, {"recipe": supervised(f"{{{model}}}/{of}", data, terms, steps, rate), "seed": 0}, [model, data])


SAVED = "run/student"
STUDENT, TEACHER_D, TEACHER_C = "student", "teacher D", "teacher C"
STAGES: dict[str, Stage] = {
    "new": Stage(blank, {"seed": 0}),
    "short plain": rows(SHORT_TERMS, 0.0, 0.0, 5),
    "switching with slips": rows(TAUGHT, SLIP, SWITCH["hazard"], 5),
    "switching, then lost": rows(TAUGHT, 0.0, SWITCH["hazard"], 5, lost=True),
    "switching": rows(TAUGHT, 0.0, SWITCH["hazard"], 5),
    "base": trained("new", "model", "short plain", SHORT_TERMS, 700, 4e-3),
    STUDENT: trained("base", SAVED, "switching with slips", TAUGHT, 260, 3e-3),
    TEACHER_D: trained(STUDENT, SAVED, "switching, then lost", TAUGHT, 250, 2e-3),
    TEACHER_C: trained(STUDENT, SAVED, "switching", TAUGHT, 500, 1e-3),
}
"""The models. Both teachers learnt from the student on."""
