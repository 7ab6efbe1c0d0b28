"""The premise of MAD-OPD, measured before any arm: a debate of two rounds knows more than the better teacher alone.

python -m reproductions.mad_opd_premise runs/mad-opd-premise
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opd.api import assembled
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.reproductions import Gate, Stage
from opd.reproductions.definition import Figures
from opd.reproductions.training import filled
from opd.teachers.debate import LiveDebate
from reproductions.mad_opd_models import (
    EXPERTS,
    PROBLEMS,
    ROUNDS,
    SAVED,
    SIZES,
    STAGES,
    START,
    TEACHER,
    TEXT,
    WORDING,
    at,
    recipe,
)


def debate(rounds: int = 2, **changes: Any) -> dict[str, Any]:
    """The recipe's block of the teachers' debate, whose draws are the same in every run."""
    experts = {name: {"model": f"{{{TEACHER[name]}}}/{SAVED}", "template": "plain", "batch": 64} for name in EXPERTS}
    own = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": TEXT, "wording": WORDING, "seed": 0}
    return {"kind": "debate", "rounds": rounds, "experts": experts, **(own if rounds else {}), **changes}


def premise(folder: Path, inputs: Mapping[str, Path], *, size: int, rounds: int) -> Figures:
    """Shares of validation problems that are right: `alone_A` and `alone_B` in round 1, `best_of_pool` where one of the
    two is, `round_R` of both experts' texts in round R on average; `gain`, round 2 less the better alone; and `tagged`,
    the share of texts with a tag."""
    values = recipe(
        f"{{{TEACHER['A']}}}/{SAVED}", 1, 0.0, teacher=debate(rounds), prompts=at(f"{{{PROBLEMS}}}", "validation")
    )
    values |= {"evaluation": {"held_out": 1, "alarm": None}, "objective": ["reverse_kl"], "output": str(folder / "run")}
    values |= {"tracking": {"trackers": []}, "seed": 0}
    run = assembled(parse_recipe(filled(values, inputs), "recipe of this measurement"))
    (teacher,) = run.teachers
    assert isinstance(teacher, LiveDebate)
    rows = [json.loads(line) for line in (inputs[PROBLEMS] / "validation.jsonl").read_text("utf-8").splitlines()[:size]]
    held = teacher.debates([Prompt(row["id"], row) for row in rows], run.context)
    wording = teacher.settings.wording
    texts = [found.rounds for found in held if found is not None]
    correct = [
        [[wording.without_tag(text) == row["answer"] for text in of_round] for of_round in rounds_of]
        for row, rounds_of in zip(rows, texts, strict=True)
    ]
    found = {f"alone_{name}": sum(each[0][k] for each in correct) / len(rows) for k, name in enumerate(EXPERTS)}
    found["best_of_pool"] = sum(any(each[0]) for each in correct) / len(rows)
    found |= {f"round_{r + 1}": sum(map(sum, (each[r] for each in correct))) / 2 / len(rows) for r in range(rounds)}
    found["gain"] = found["round_2"] - max(found[f"alone_{name}"] for name in EXPERTS)
    tags = [wording.sure(text) is not None for rounds_of in texts for of_round in rounds_of for text in of_round]
    return {**found, "tagged": sum(tags) / len(tags)}


STAGE = Stage(premise, {"size": SIZES["validation"], "rounds": ROUNDS}, [PROBLEMS, *TEACHER.values()])
GATES = [
    Gate("premise", "gain", at_least=0.05),
    Gate("premise", "tagged", at_least=0.95),
    Gate(START, "accuracy", at_least=0.1),
    Gate(START, "accuracy", at_most=0.45),
]
"""Without the gain the claim cannot be tested: the teachers are mended first, and the page says so. A start must have
something to learn and something to begin with."""
WANTED = (PROBLEMS, "new teacher", *(f"lessons of {name}" for name in EXPERTS), *TEACHER.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the teachers where they are missing and measure their debates.")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    places: dict[str, Path] = {}
    for name, stage in {**{name: STAGES[name] for name in WANTED}, "premise": STAGE}.items():
        places[name] = options.folder / name
        done = places[name] / "job.json"
        if not done.exists():
            places[name].mkdir(parents=True, exist_ok=True)
            started = time.process_time()
            figures = stage.function(places[name], {wanted: places[wanted] for wanted in stage.inputs}, **stage.params)
            record = {"figures": figures, "cpu_seconds": time.process_time() - started}
            done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        record = json.loads(done.read_text(encoding="utf-8"))
        print(f"{name}: {record['cpu_seconds']:.0f} CPU seconds", flush=True)
    for name, value in record["figures"].items():
        print(f"{name}: {value:.3f}", flush=True)
    for gate in GATES:
        if gate.stage != "premise":
            continue
        print(f"gate {gate.figure} {gate.limit}: {'yes' if gate.passes(record['figures'][gate.figure]) else 'NO'}")


if __name__ == "__main__":
    main()
