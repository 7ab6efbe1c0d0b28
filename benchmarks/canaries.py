"""Can planted secrets be told from a student? `python -m benchmarks.canaries [--quick] --json PATH`.

Records are texts of a name and six digits that follow from it by a rule. Among them stand canaries: names of their own
with digits drawn at random, once each. Exposure (Carlini et al. 2019) of a canary is `log2 |R| - log2 rank`, the rank
of its digits by the student's likelihood among R other random ones: about 1 on average for a student that never saw
it, `log2 |R|` for one that knows it by heart. Every student begins as the same model of random weights. Fine-tuning
without privacy sees every record many times; DP-SGD and DP-OPD (half of the steps on the student's own continuations,
hard labels at 0.5 on the references) do so at epsilon 2, and DP-OPD also without noise. Its teacher learnt other names
of the same rule, without canaries.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.alternation import silence, versions_and_machine, write
from benchmarks.whole import execute_whole
from opd.language.creation import create_model, symbol_tokenizer
from opd.recipe import parse_recipe
from opd.reproductions.definition import merged

LETTERS, DIGITS, LENGTH = "abcdefghijklmnopqrst", "0123456789", 6
RECORDS, CANARIES, OTHERS, STEPS, BATCH, EPSILON = 1000, 20, 1000, 400, 64, 2.0
"""Records and canaries, random digits that a canary is ranked among, steps, prompts of a step, and the budget."""


def records(count: int, seed: int, first: str = LETTERS[:-1]) -> list[dict[str, str]]:
    """Names of four letters that begin with one of `first`, and the digits of their rule."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        name = draw.choice(first) + "".join(draw.choice(LETTERS) for _ in range(3))
        sums = [sum(map(LETTERS.index, name[: 1 + j % 4])) + j for j in range(LENGTH)]
        found.append({"id": f"{seed}-{i}", "prompt": f"{name}:", "response": "".join(DIGITS[s % 10] for s in sums)})
    return found


def canaries(count: int, seed: int) -> list[dict[str, str]]:
    """The same with names that begin with the last letter, and digits at random."""
    draw = random.Random(f"canaries/{seed}")
    made = records(count, seed, LETTERS[-1])
    return [{**row, "id": f"canary-{row['id']}", "response": digits(draw)} for row in made]


def digits(draw: random.Random) -> str:
    return "".join(draw.choice(DIGITS) for _ in range(LENGTH))


@torch.no_grad()
def exposures(model: Path, planted: list[dict[str, str]], others: int, seed: int) -> list[float]:
    """The exposure of each canary, in bits."""
    language, words = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    draw, found = random.Random(f"others/{seed}"), []
    for row in planted:
        texts = [row["response"], *(digits(draw) for _ in range(others - 1))]
        begun = torch.tensor(words(row["prompt"])["input_ids"]).expand(others, -1)
        rest = torch.tensor([words(text)["input_ids"] for text in texts])
        log_q = language(torch.cat([begun, rest], 1)).logits[:, begun.shape[1] - 1 : -1].float().log_softmax(-1)
        likely = log_q.gather(2, rest[..., None]).sum((1, 2))
        rank = 1 + int((likely[1:] > likely[0]).sum())
        found.append(math.log2(others) - math.log2(rank))
    return found


def recipe(student: str, rows: list[dict[str, str]], steps: int, batch: int, **changes: Any) -> dict[str, Any]:
    base = {
        "steps": steps,
        "student": {"model": student, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": rows},
        "rollout": {"kind": "data", "max_new_tokens": LENGTH + 1},
        "objective": ["sft"],
        "reduction": "sequence_mean",
        "update": {"learning_rate": 3e-3},
        "batch": {"prompts": batch, "micro": 128},
        "evaluation": {"prompts": {"kind": "inline", "prompts": records(2, 99)}, "samples": 0, "alarm": None},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    return {**merged(base, changes), **{k: changes[k] for k in ("rollout", "objective") if k in changes}}


def arms(teacher: str) -> Mapping[str, dict[str, Any]]:
    """What each student's recipe changes of fine-tuning."""
    private = {"kind": "differentially_private", "clip_norm": 1.0}
    drawn: dict[str, Any] = {"curriculum": {"kind": "poisson"}}
    sources = {
        name: {"kind": kind, "max_new_tokens": LENGTH + 1} for name, kind in (("first", "student"), ("second", "data"))
    }
    opd = {
        **drawn,
        "teacher": [{"model": teacher, "template": "plain"}],
        "rollout": {"kind": "mixture", **sources, "share": 0.5, "by": "batch"},
        "objective": ["jensen_shannon", {"kind": "sft", "weight": 0.5, "written_by": ["data"]}],
    }
    budget = {**private, "epsilon": EPSILON}
    return {
        "fine-tuned without privacy": {},
        f"DP-SGD, epsilon {EPSILON:g}": {**drawn, "update": budget},
        f"DP-OPD, epsilon {EPSILON:g}": {**opd, "update": budget},
        "DP-OPD, no noise": {**opd, "update": {**private, "noise_multiplier": 0.0}},
    }


def measured(folder: Path, quick: bool, seed: int) -> dict[str, Any]:
    """Exposure of the canaries and loss on other records, of every student."""
    count, steps, batch, others = (60, 2, 8, 20) if quick else (RECORDS, STEPS, BATCH, OTHERS)
    planted = canaries(3 if quick else CANARIES, seed)
    for name, width in (("start", 64), ("blank", 96)):
        create_model(folder / name, symbol_tokenizer([*LETTERS, *DIGITS, ":"]), width=width, seed=seed)
    public = recipe(str(folder / "blank"), records(count, 1), 2 * steps, batch)
    execute_whole(parse_recipe({**public, "seed": seed, "output": str(folder / "teacher")}))
    found: dict[str, Any] = {"start": exposures(folder / "start", planted, others, seed)}
    rows = [*records(count, 2), *planted]
    privacy = {}
    for name, changes in arms(str(folder / "teacher" / "student")).items():
        made = {**recipe(str(folder / "start"), rows, steps, batch, **changes), "seed": seed}
        place = folder / name.replace(" ", "-").replace(",", "")
        result = execute_whole(parse_recipe({**made, "output": str(place)}))
        found[name] = exposures(place / "student", planted, others, seed)
        privacy[name] = result.summary.get("privacy")
    return {"bits": math.log2(others), "exposures": found, "privacy": privacy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of everything, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        report = {**versions_and_machine(), **measured(Path(place), options.quick, options.seed)}
    for name, bits in report["exposures"].items():
        print(
            f"{name}: exposure {statistics.mean(bits):.2f} bits on average, {max(bits):.2f} at most, of "
            f"{report['bits']:.2f}"
        )
    if options.json is not None:
        write(options.json, report)


if __name__ == "__main__":
    main()
