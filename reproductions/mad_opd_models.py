"""The task of the reproduction of MAD-OPD, and its models: two teachers who know a half each and learnt to debate.

A problem has three parts, `u3v7u1:`, each a letter and a digit, and its answer three digits, one for each part: code u
turns a digit into another, and so does code v. Teacher A knows code u and has half of code v wrong, always in the same
way; teacher B knows code v and has six tenths of code u wrong. How sure a teacher says it is (`c50`) is how often it is
right about a problem with as many parts of each code.

That a debate helps is *trained*: from solutions of other problems each teacher learnt to answer alone, to answer with a
tag, to read a transcript and take from it A's word on u and B's on v, and to do so when it scores. It is never shown a
digit that neither teacher proposed. This tests what training on a debate does, not whether debates come about by
themselves.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opd.language.creation import create_model, symbol_tokenizer
from opd.procedural.base import Split, split_of
from opd.reproductions import Stage, train
from opd.reproductions.definition import Figures, merged

Expert = Literal["A", "B"]
EXPERTS: tuple[Expert, ...] = ("A", "B")
KNOWS = {"A": "u", "B": "v"}
WRONG = {"A": 5, "B": 6}
"""How many of the ten digits of the other code a teacher has wrong."""
CODES = {"u": "3918275064", "v": "7204963158"}
"""What each code turns 0 to 9 into."""
PARTS = 3
SYMBOLS = tuple("0123456789uv:c?!=AB[]")
WORDING = {
    "role": "?",
    "confidence": "",
    "revise": "!",
    "focus": "",
    "label": "{expert}",
    "begin": "[",
    "end": "]",
    "identity": "{expert}",
    "cue": "=",
    "tag": "c{number}",
    "gap": "",
}
"""A debate in as few characters as can be: `?u3v7u1:`, then `u3v7u1:[A814c50B839c16]!`, and to score
`u3v7u1:A[A814c50B839c16A819c95B819c95]=`."""
SETTLED = 95
"""How sure both are behind a transcript."""
CAP, TEXT = 5, 9
"""Most new tokens of an answer and of a text with its tag."""
ROUNDS = 3
"""Most rounds of a transcript that the teachers learnt to read."""


# -- problems and what is believed about them --------------------------------------------------------------------------


def parts(prompt: str) -> list[tuple[str, int]]:
    """Code and digit of each part of `u3v7u1:`."""
    return [(prompt[2 * i], int(prompt[2 * i + 1])) for i in range(PARTS)]


def right(code: str, digit: int) -> int:
    return int(CODES[code][digit])


def believed(expert: Expert, code: str, digit: int) -> int:
    """What a teacher holds for one part: of a code that it does not know the first digits are wrong."""
    wrong = code != KNOWS[expert] and digit < WRONG[expert]
    return (right(code, digit) + (1 + digit if wrong else 0)) % 10


def answer(prompt: str) -> str:
    return "".join(str(right(*part)) for part in parts(prompt))


def alone(expert: Expert, prompt: str) -> str:
    """What a teacher answers by itself."""
    return "".join(str(believed(expert, *part)) for part in parts(prompt))


def sure(expert: Expert, prompt: str) -> int:
    """How often it is right about a problem with such codes, of 99."""
    foreign = sum(code != KNOWS[expert] for code, _ in parts(prompt))
    return round(99 * (1 - WRONG[expert] / 10) ** foreign)


def together(prompt: str, proposals: Mapping[Expert, str]) -> str:
    """A's word on u and B's on v."""
    by = {code: expert for expert, code in KNOWS.items()}
    return "".join(proposals[by[code]][i] for i, (code, _) in enumerate(parts(prompt)))  # type: ignore[index]


def problems(size: int, split: Split, seed: int = 0) -> list[str]:
    """Different problems of one split, drawn by `seed`."""
    rng, found = random.Random(f"debated {split} {seed}"), dict[str, None]()
    while len(found) < size:
        prompt = "".join(f"{rng.choice('uv')}{rng.randrange(10)}" for _ in range(PARTS)) + ":"
        if split_of(prompt) == split:
            found[prompt] = None
    return list(found)


# -- rows --------------------------------------------------------------------------------------------------------------


def transcript(rounds: Sequence[Mapping[Expert, str]]) -> str:
    """The texts of rounds as the debate's wording writes them."""
    return "[" + "".join(f"{name}{texts[name]}" for texts in rounds for name in EXPERTS) + "]"


def lesson(expert: Expert, prompt: str, rng: random.Random) -> tuple[str, str]:
    """One thing that a teacher learns: what it reads, and what it writes."""
    kind = rng.choice(("alone", "first", "later", "score", "score"))
    if kind == "alone":
        return prompt, alone(expert, prompt)
    first = {name: alone(name, prompt) for name in EXPERTS}
    tagged = {name: f"{first[name]}c{sure(name, prompt)}" for name in EXPERTS}
    if kind == "first":
        return f"?{prompt}", tagged[expert]
    settled = together(prompt, first)
    before = [tagged, *[dict.fromkeys(EXPERTS, f"{settled}c{SETTLED}")] * rng.randrange(ROUNDS)]
    if kind == "later":
        return f"{prompt}{transcript(before)}!", f"{settled}c{SETTLED}"
    return f"{prompt}{expert}{transcript(before)}=", settled


def lessons(folder: Path, inputs: Mapping[str, Path], *, expert: Expert, size: int, seed: int) -> Figures:
    """What a teacher learns from, in `folder/rows.jsonl`; on problems that no student is trained on."""
    rng = random.Random(f"lessons {expert} {seed}")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for prompt in problems(size, "train", TAUGHT):
            read, written = lesson(expert, prompt, rng)
            file.write(json.dumps({"prompt": read, "response": written}) + "\n")
    return {}


def asked(folder: Path, inputs: Mapping[str, Path], *, sizes: Mapping[str, int]) -> Figures:
    """Problems with their answers, and each with another one's text in the column `other`, in `folder/SPLIT.jsonl`;
    training problems are none of the teachers' lessons."""
    for split, size in sizes.items():
        taken = set(problems(LESSONS, "train", TAUGHT)) if split == "train" else set()
        found = [p for p in problems(size + len(taken), split, ASKED) if p not in taken][:size]  # type: ignore[arg-type]
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for prompt, other in zip(found, [*found[1:], found[0]], strict=True):
                row = {"id": prompt, "prompt": prompt, "answer": answer(prompt), "other": other}
                file.write(json.dumps({**row, "response": row["answer"]}) + "\n")
    return {}


def slips(folder: Path, inputs: Mapping[str, Path], *, size: int, share: float, seed: int) -> Figures:
    """Problems whose digits are any digit with probability `share` each, in `folder/rows.jsonl`: what students begin
    with."""
    rng = random.Random(f"slips {seed}")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for prompt in problems(size, "train", BEGUN):
            said = [str(rng.randrange(10)) if rng.random() < share else digit for digit in answer(prompt)]
            file.write(json.dumps({"prompt": prompt, "response": "".join(said)}) + "\n")
    return {}


TAUGHT, ASKED, BEGUN = 1, 2, 3
"""Seeds of draws: the teachers' lessons, what arms are asked, and what students begin with."""
LESSONS = 3000
SIZES = {"train": 3000, "validation": 200, "test": 500}


# -- models ------------------------------------------------------------------------------------------------------------


def blank(folder: Path, inputs: Mapping[str, Path], *, width: int, layers: int, seed: int) -> Figures:
    """A model with random weights and the alphabet's tokenizer, in `folder/model`."""
    create_model(
        folder / "model",
        symbol_tokenizer(SYMBOLS),
        width=width,
        layers=layers,
        heads=4,
        feed_forward=2 * width,
        seed=seed,
    )
    return {}


def recipe(student: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A recipe on these problems; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": {"model": student, "template": "plain"},
        "teacher": [],
        "verifier": "exact_match",
        "rollout": {"kind": "student", "max_new_tokens": CAP},
        "reduction": "sequence_mean",
        "update": {
            "learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": 10},
            "betas": [0.9, 0.98],
        },
        "batch": {"prompts": 32, "micro": 32},
        "evaluation": {"prompts": at("{problems}", "validation"), "max_new_tokens": CAP, "samples": 0, "alarm": None},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "self_test": False,
    }
    return merged(base, changes)


def at(folder: str, split: str) -> dict[str, Any]:
    """The recipe's block of problems of a split."""
    return {"kind": "file", "path": f"{folder}/{split}.jsonl", "answer": "answer"}


def supervised(model: str, rows: str, steps: int, rate: float, batch: int) -> dict[str, Any]:
    """Fine-tuning on the rows of a stage."""
    return recipe(
        model,
        steps,
        rate,
        prompts={"kind": "file", "path": f"{{{rows}}}/rows.jsonl"},
        rollout={"kind": "data", "max_new_tokens": TEXT},
        objective=["sft"],
        batch={"prompts": batch, "micro": batch},
    )


SAVED = "run/student"
PROBLEMS = "problems"
TEACHER = {"A": "teacher A", "B": "teacher B"}
TEACHING = {"steps": 320, "rate": 4e-3, "batch": 64}
BEGINNING = {"steps": 220, "rate": 6e-3, "batch": 64}
SLIP = 0.25
NEW, SLIPS, START = "new student", "slips", "start"
OF_RATES = {NEW: f"{NEW} of rates", START: f"{START} of rates"}
"""The same with a seed that no arm has, for the choice of learning rates."""
SEED_OF_RATES = 100


def _start(new: str, **own: Any) -> Stage:
    params = {"recipe": supervised(f"{{{new}}}/model", SLIPS, **BEGINNING), **own}
    return Stage(train, params, [new, SLIPS, PROBLEMS], per_seed=not own)


STAGES: dict[str, Stage] = {
    PROBLEMS: Stage(asked, {"sizes": SIZES}),
    SLIPS: Stage(slips, {"size": 2000, "share": SLIP, "seed": 0}),
    "new teacher": Stage(blank, {"width": 64, "layers": 3, "seed": 0}),
    **{f"lessons of {name}": Stage(lessons, {"expert": name, "size": LESSONS, "seed": 0}) for name in EXPERTS},
    **{
        TEACHER[name]: Stage(
            train,
            {"recipe": supervised("{new teacher}/model", f"lessons of {name}", **TEACHING), "seed": 0},
            ["new teacher", f"lessons of {name}", PROBLEMS],
        )
        for name in EXPERTS
    },
    NEW: Stage(blank, {"width": 48, "layers": 2}, per_seed=True),
    START: _start(NEW),
    OF_RATES[NEW]: Stage(blank, {"width": 48, "layers": 2, "seed": SEED_OF_RATES}),
    OF_RATES[START]: _start(OF_RATES[NEW], seed=SEED_OF_RATES),
}
"""The models. There is one pair of teachers, and a start for each seed."""
