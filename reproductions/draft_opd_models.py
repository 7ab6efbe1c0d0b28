"""The models of the reproduction of Draft-OPD: a small target that writes register programs and facts, and what it
wrote.

A register program starts from four digits and works off a few steps; a fact is a sentence about one of 48 things.
Wording, registers and what is said of a thing are drawn, with favourites (the largest register, say), and
the rest follows from what stands before, as in answers of a real model. The target learnt it from texts drawn in code.
It need not be right: what a drafter is held to is what the target writes.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.api import assembled
from opd.asking import RunAsker
from opd.language.creation import create_model, symbol_tokenizer
from opd.measurement import Clock
from opd.prompts import load_prompts
from opd.recipe import parse_recipe
from opd.reproductions import Stage, train
from opd.reproductions.definition import Figures, merged
from opd.reproductions.training import filled
from opd.rollouts.student import StudentRollout

CAP = 64
"""Most new tokens: more than any text has."""
REGISTERS = ("a", "b", "c", "d")
OPENERS: dict[str, float] = {"now": 0.5, "then": 0.3, "next": 0.2}
OPERATIONS: dict[str, tuple[str, float]] = {"add": ("to", 0.5), "take": ("from", 0.3), "copy": ("to", 0.2)}
ADVERBS: dict[str, float] = {"very": 0.4, "quite": 0.3, "rather": 0.2, "hardly": 0.1}
THINGS, TRAITS, SORTS, VERBS, OBJECTS = 48, 16, 8, 10, 16
FAVOURED = 0.3
"""How often a text takes the favourite without looking at the others, so that greedy texts do not hang on ties."""
PROGRAMS = 0.6
"""Share of register programs; the rest are facts."""
SENTENCES = (3, 4)
"""Steps of a program, and facts of a text."""
SYMBOLS = (
    *"0123456789:.",
    *REGISTERS,
    *OPENERS,
    *OPERATIONS,
    *ADVERBS,
    *("to", "from", "is", "state", "start", "steps", "tell", "the", "one", "that"),
    *(
        f"{letter}{i}"
        for letter, count in zip("etkvo", (THINGS, TRAITS, SORTS, VERBS, OBJECTS), strict=True)
        for i in range(count)
    ),
)
MASK = 2
"""The id of `<unk>`, which no text has."""


def drawn(weights: Mapping[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def program(rng: random.Random) -> tuple[str, str]:
    """A prompt and a text: `start 3 4 1 6 steps 3 :` and `now add a to b : b is 7 state 3 7 1 6 . ...`"""
    state, steps = [rng.randrange(10) for _ in REGISTERS], rng.randint(*SENTENCES)
    prompt, parts = f"start {' '.join(map(str, state))} steps {steps} :", []
    for _ in range(steps):
        largest = state.index(max(state))
        source = largest if rng.random() < FAVOURED else rng.randrange(len(REGISTERS))
        into = (source + (1 if rng.random() < FAVOURED else rng.randint(1, len(REGISTERS) - 1))) % len(REGISTERS)
        operation = drawn({name: weight for name, (_, weight) in OPERATIONS.items()}, rng)
        given = state[source]
        state[into] = {"add": state[into] + given, "take": state[into] - given, "copy": given}[operation] % 10
        said = f"{drawn(OPENERS, rng)} {operation} {REGISTERS[source]} {OPERATIONS[operation][0]} {REGISTERS[into]}"
        parts.append(f"{said} : {REGISTERS[into]} is {state[into]} state {' '.join(map(str, state))} .")
    return prompt, " ".join(parts)


def facts(rng: random.Random) -> tuple[str, str]:
    """A prompt and a text: `tell e7 e3 e21 :` and `the e7 is one very t1 t4 k2 that v3 the o9 . ...`"""
    asked = [rng.randrange(THINGS) for _ in range(rng.randint(*SENTENCES))]
    return f"tell {' '.join(f'e{i}' for i in asked)} :", " ".join(sentence(i, rng) for i in asked)


def sentence(thing: int, rng: random.Random) -> str:
    """Of three traits that the thing has two are named, of two deeds one; it has favourites among both."""
    has = random.Random(thing)
    traits, sort = has.sample(range(TRAITS), 3), has.randrange(SORTS)
    deeds = [(has.randrange(VERBS), has.randrange(OBJECTS)) for _ in range(2)]
    one = traits.pop(0 if rng.random() < FAVOURED else rng.randrange(3))
    other = traits[0 if rng.random() < FAVOURED else 1]
    verb, what = deeds[0 if rng.random() < FAVOURED else 1]
    return f"the e{thing} is one {drawn(ADVERBS, rng)} t{one} t{other} k{sort} that v{verb} the o{what} ."


def texts(folder: Path, inputs: Mapping[str, Path], *, sizes: Mapping[str, int], seed: int) -> Figures:
    """`folder/NAME.jsonl` for each of `sizes`, no prompt in two of them; the figure is the length of a text in tokens,
    its end included."""
    rng, seen, lengths = random.Random(seed), set[str](), []
    for name, size in sizes.items():
        mine: dict[str, str] = {}
        while len(mine) < size:
            prompt, text = program(rng) if rng.random() < PROGRAMS else facts(rng)
            if prompt not in seen:
                mine[prompt] = text
        seen |= mine.keys()
        lengths += [len(text.split()) + 1 for text in mine.values()]
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for i, (prompt, text) in enumerate(mine.items()):
                file.write(json.dumps({"id": f"{name}-{i}", "prompt": prompt, "response": text}) + "\n")
    return {"length": sum(lengths) / len(lengths)}


def blank(folder: Path, inputs: Mapping[str, Path], *, width: int, layers: int, mlp: int, seed: int) -> Figures:
    """A model with random weights and a tokenizer of whole words, in `folder/model`."""
    tokenizer = symbol_tokenizer(SYMBOLS, words=True)
    create_model(folder / "model", tokenizer, width=width, layers=layers, heads=4, feed_forward=mlp, seed=seed)
    return {}


def answered(folder: Path, inputs: Mapping[str, Path], *, of: Sequence[str], size: int | None, seed: int) -> Figures:
    """An answer of the target, at a temperature of 1, to the first `size` prompts of each of the files `of`, in
    `folder/NAME.jsonl`."""
    tokens, count, began = 0, 0, time.process_time()
    for name in of:
        own = {"prompts": prompts(name, size), "teacher": [], "objective": ["sft"], "tracking": {"trackers": []}}
        block = recipe(OF_TARGET, 1, 0.0, **own, rollout={"kind": "data", "max_new_tokens": CAP}, seed=seed)
        run = assembled(parse_recipe({**filled(block, inputs), "output": str(folder / name)}, "recipe of the answers"))
        asker, asked, lines = RunAsker(run, Clock()), load_prompts(run.recipe.prompts), []
        for first in range(0, len(asked), 256):
            made = asker.roll_out(asked[first : first + 256], by=StudentRollout(max_new_tokens=CAP))
            tokens, count = tokens + made.positions, count + len(made)
            for prompt, actions in zip(made.prompts, made.completions(), strict=True):
                row = {"id": prompt.id, "prompt": prompt.fields["prompt"], "response": run.student.decode(actions)}
                lines.append(json.dumps(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    seconds = time.process_time() - began
    return {"cpu_seconds": seconds, "sampled_tokens": float(tokens), "length": tokens / count}


def prompts(name: str, limit: int | None = None) -> dict[str, Any]:
    """The recipe's block of prompts: the first `limit` of a file that the stage `texts` wrote."""
    block = {"kind": "file", "path": f"{{{TEXTS}}}/{name}.jsonl"}
    return block if limit is None else {**block, "limit": limit}


def recipe(student: Mapping[str, Any], steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A recipe of this reproduction; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": student,
        "prompts": prompts("train"),
        "update": {"learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": max(1, steps // 20)}},
        "evaluation": {"prompts": prompts("validation", 64), "max_new_tokens": CAP, "samples": 0},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    return merged(base, changes)


TEXTS, NEW, TARGET, ANSWERS = "texts", "new", "target", "answers"
DRAFTER = {"kind": "block", "layers": 1, "taps": [0, 1, 2], "block": 8, "mlp": 192, "mask_token": MASK}
SAVED = "run/student"
OF_TARGET = {"model": f"{{{TARGET}}}/{SAVED}", "template": "plain"}
STAGES: dict[str, Stage] = {
    TEXTS: Stage(
        texts, {"sizes": {"train": 12_000, "taught": 2500, "new": 3000, "validation": 400, "test": 400}, "seed": 0}
    ),
    NEW: Stage(blank, {"width": 96, "layers": 4, "mlp": 256, "seed": 0}),
    TARGET: Stage(
        train,
        {
            "recipe": recipe(
                {"model": f"{{{NEW}}}/model", "template": "plain"},
                600,
                3e-3,
                teacher=[],
                rollout={"kind": "data", "max_new_tokens": CAP},
                objective=["sft"],
                batch={"prompts": 64, "micro": 64},
            ),
            "seed": 0,
        },
        [TEXTS, NEW],
    ),
    ANSWERS: Stage(answered, {"of": ["taught", "new"], "size": None, "seed": 1}, [TEXTS, TARGET]),
}
