"""The models of the reproduction of MAD-OPD with agents: two teachers who learnt to debate, and a start for each seed.

From states of episodes that somebody clumsy played each teacher learnt to call alone, to call with a tag that says how
sure it is, to read what both said and give in or not, and to do so when it scores. It is never shown a call that
neither teacher proposed. That a debate helps is *trained*: this tests what training on a debate does to an agent, not
whether debates come about by themselves.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.api import assembled
from opd.evaluation import evaluate
from opd.language.creation import create_model, symbol_tokenizer
from opd.prompts.messages import Messages
from opd.recipe import parse_recipe
from opd.reproductions import Stage, train
from opd.reproductions.definition import Figures, merged
from opd.teachers.wording import Wording
from reproductions.mad_opd_agents_machine import (
    JAM,
    REPAIR,
    State,
    alone,
    played,
    right_call,
    settled,
    state_of,
    sure,
    texts,
)
from reproductions.mad_opd_models import EXPERTS, WORDING, Expert

SYMBOLS = tuple("0123456789uvrxc?!=AB[]")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
"""An episode in as few characters as can be: `3uu9<eos>9vv3<eos>xr<eos>5v`. A debate about it says, from its last
message on, `?5v`, then `5v[Av7c50Bv9c99]!`, and to score `5vA[Av7c50Bv9c99Av7c50Bv9c99]=`."""
WORDS = Wording(**WORDING)
CAP, TEXT = 4, 7
"""Most new tokens of a call and of a text with its tag."""
CONTEXT = 64
"""Most tokens of an episode before a call."""
TRAIN, VALIDATION, TEST = 2, 1, 0
"""Seeds of initial states."""
TAUGHT, SHOWN = 7_000_000, 8_000_000
"""Where seeds of episodes begin that no arm plays: those of lessons and of demonstrations."""
SIZES = {"validation": 200, "test": 500}
LESSONS = 6000


# -- rows --------------------------------------------------------------------------------------------------------------


def clumsy(
    rng: random.Random, slip: float, repairs: float, nonsense: float = 0.0, unknown: Sequence[int] = range(10)
) -> Callable[[State], str]:
    """Somebody who calls with any digit with probability `slip` where the register is one of `unknown`, frees a jammed
    machine with probability `repairs` and else calls something, and says anything at all with probability `nonsense`.
    """

    def call(state: State) -> str:
        if rng.random() < nonsense:
            return "".join(rng.choice("0123456789uvrx") for _ in range(rng.randrange(CAP)))
        if state.tool == JAM:
            return REPAIR if rng.random() < repairs else f"{rng.choice('uv')}{rng.randrange(10)}"
        slips = state.register in unknown and rng.random() < slip
        return f"{state.tool}{rng.randrange(10)}" if slips else right_call(state)

    return call


def lesson(expert: Expert, said: Messages, rng: random.Random) -> tuple[str | Messages, str]:
    """One thing that a teacher learns in a state: what it reads, and what it writes."""
    state, kind, rounds = state_of(said), rng.choice(("alone", "first", "later", "score", "score")), rng.choice((1, 2))
    if kind == "alone":
        return said, alone(expert, state)
    if kind == "first":
        return WORDS.first(said, expert, "general"), f"{alone(expert, state)}c{sure(expert, state)}"
    if kind == "later":
        read = WORDS.later(said, expert, "general", EXPERTS, texts(state, 1))
        return read, f"{settled(expert, state, 1)}c{sure(expert, state)}"
    return WORDS.scoring(said, expert, EXPERTS, texts(state, rounds)), settled(expert, state, rounds)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(rows)), encoding="utf-8")


def lessons(folder: Path, inputs: Mapping[str, Path], *, expert: Expert, size: int, seed: int) -> Figures:
    """What a teacher learns from, in `folder/rows.jsonl`: one lesson in each state of clumsy episodes."""
    rng, rows = random.Random(f"lessons {expert} {seed}"), list[dict[str, Any]]()
    call = clumsy(rng, slip=0.3, repairs=0.7, nonsense=0.1)
    for i in range(size):
        if len(rows) >= size:
            break
        for said, _ in played(TAUGHT + i, call):
            read, written = lesson(expert, said, rng)
            rows.append({"prompt": read, "response": written})
    _write(folder / "rows.jsonl", rows[:size])
    return {}


def demonstrated(
    folder: Path, inputs: Mapping[str, Path], *, episodes: int, unknown: Sequence[int], repairs: float, seed: int
) -> Figures:
    """Every call of clumsy episodes, wrong ones too, in `folder/rows.jsonl`: what students begin with."""
    call = clumsy(random.Random(f"demonstrated {seed}"), 1.0, repairs, unknown=unknown)
    found = [{"prompt": said, "response": made} for i in range(episodes) for said, made in played(SHOWN + i, call)]
    _write(folder / "rows.jsonl", found)
    return {"rows": float(len(found))}


# -- recipes -----------------------------------------------------------------------------------------------------------


def model(folder: str, **own: Any) -> dict[str, Any]:
    return {"model": folder, "template": "chat", **own}


def episodes(per_task: int, seed: int) -> dict[str, Any]:
    """The recipe's block of episodes."""
    return {"kind": "episodes", "environment": {"kind": "two_tools"}, "per_task": per_task, "seed": seed}


AGENT = {"kind": "agent", "max_new_tokens": CAP, "turns": 8, "max_context_tokens": CONTEXT}
"""The machine ends an episode after six calls."""


def recipe(student: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A recipe on the machine; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": model(student),
        "teacher": [],
        "reduction": "sequence_mean",
        "update": {
            "learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": 10},
            "betas": [0.9, 0.98],
        },
        "evaluation": {"samples": 0, "alarm": None},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "self_test": False,
    }
    return merged(base, changes)


def supervised(student: str, rows: str, steps: int, rate: float, batch: int) -> dict[str, Any]:
    """Fine-tuning on the rows of a stage."""
    return recipe(
        student,
        steps,
        rate,
        prompts={"kind": "file", "path": f"{{{rows}}}/rows.jsonl"},
        rollout={"kind": "data", "max_new_tokens": TEXT},
        objective=["sft"],
        batch={"prompts": batch, "micro": batch},
        evaluation={"held_out": 16},
    )


# -- the jobs ----------------------------------------------------------------------------------------------------------


def blank(folder: Path, inputs: Mapping[str, Path], *, width: int, layers: int, seed: int) -> Figures:
    """A model with random weights that reads episodes, in `folder/model`."""
    tokenizer = symbol_tokenizer(SYMBOLS)
    tokenizer.chat_template = TEMPLATE
    sizes = {"width": width, "layers": layers, "heads": 4, "feed_forward": 2 * width}
    create_model(folder / "model", tokenizer, **sizes, seed=seed)
    return {}


def alone_in(folder: Path, student: str, rows: Mapping[str, Any], seed: int, **changes: Any) -> dict[str, Any]:
    """A recipe that plays episodes of `rows` with a student that is not trained."""
    own = {
        "prompts": episodes(2, TRAIN),
        "rollout": AGENT,
        "objective": ["grpo"],
        "batch": {"prompts": 2, "group": 2, "micro": 64},
        "evaluation": {"prompts": rows},
        "tracking": {"trackers": []},
        "seed": seed,
        "output": str(folder),
    }
    return recipe(student, 1, 0.0, **merged(own, changes))


def judged(folder: Path, student: Path, *, split: str, size: int, seed: int) -> Figures:
    """Over episodes of a split, sampled at temperature 1: `SPLIT_accuracy`, the share of successes, and by item;
    `SPLIT_repairs`, the share of jams that the next call frees, where there was one before the last call."""
    rows = episodes(size, {"validation": VALIDATION, "test": TEST}[split])
    run = assembled(parse_recipe(alone_in(folder, str(student), rows, seed), "recipe of this test"))
    try:
        found = evaluate(run)
    finally:
        run.rollout.close()
    turns = [pair for row in found.rows for pair in itertools.pairwise(row["turns"])]
    freed = [after["said"] == REPAIR for before, after in turns if before["heard"][-1]["content"] == JAM]
    return {
        f"{split}_accuracy": found.metrics["accuracy"],
        **({f"{split}_repairs": sum(freed) / len(freed)} if freed else {}),
        "items": {f"{split}_accuracy": found.items["accuracy"]},
    }


def started(folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], size: int, seed: int) -> Figures:
    """Fine-tune a student and play validation episodes: `accuracy` is the share of successes."""
    train(folder, inputs, recipe=recipe, seed=seed)
    found = judged(folder / "validation", folder / SAVED, split="validation", size=size, seed=seed)
    return {"accuracy": found["validation_accuracy"]}


SAVED = "run/student"
TEACHER = {"A": "teacher A", "B": "teacher B"}
TEACHING = {"steps": 320, "rate": 4e-3, "batch": 64}
BEGINNING = {"steps": 380, "rate": 6e-3, "batch": 48}
UNKNOWN, REPAIRS = [1, 4, 6, 8], 0.5
"""Registers about which the demonstrator calls with any digit, and how often it frees a jammed machine."""
NEW, DEMONSTRATIONS, START = "new student", "demonstrations", "start"
OF_RATES = {NEW: f"{NEW} of rates", START: f"{START} of rates"}
"""The same with a seed that no arm has, for the choice of learning rates."""
SEED_OF_RATES = 100


def _start(new: str, **own: Any) -> Stage:
    params = {"recipe": supervised(f"{{{new}}}/model", DEMONSTRATIONS, **BEGINNING), "size": SIZES["validation"], **own}
    return Stage(started, params, [new, DEMONSTRATIONS], per_seed=not own)


STAGES: dict[str, Stage] = {
    DEMONSTRATIONS: Stage(demonstrated, {"episodes": 400, "unknown": UNKNOWN, "repairs": REPAIRS, "seed": 0}),
    "new teacher": Stage(blank, {"width": 64, "layers": 3, "seed": 0}),
    **{f"lessons of {name}": Stage(lessons, {"expert": name, "size": LESSONS, "seed": 0}) for name in EXPERTS},
    **{
        TEACHER[name]: Stage(
            train,
            {"recipe": supervised("{new teacher}/model", f"lessons of {name}", **TEACHING), "seed": 0},
            ["new teacher", f"lessons of {name}"],
        )
        for name in EXPERTS
    },
    NEW: Stage(blank, {"width": 48, "layers": 2}, per_seed=True),
    START: _start(NEW),
    OF_RATES[NEW]: Stage(blank, {"width": 48, "layers": 2, "seed": SEED_OF_RATES}),
    OF_RATES[START]: _start(OF_RATES[NEW], seed=SEED_OF_RATES),
}
"""The models. There is one pair of teachers, and a start for each seed."""
