"""The premise of VLA-OPD, measured before any arm: the start is middling and the teacher good; and whether the teacher
is less sure on the start's states than on its own.

python -m reproductions.vla_opd_premise runs/vla-opd-premise --seeds 0
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from opd.reproductions import Gate, Stage
from opd.reproductions.definition import Figures
from reproductions.vla_opd_models import STAGES, START, TEACHER, VALIDATION, episodes, success


def premise(folder: Path, inputs: Mapping[str, Path], *, per_task: int, seed: int) -> Figures:
    """What decides whether the claims can be tested on the start of this seed, on initial states of no test.

    Returns:
        `start` and `teacher`, shares of episodes that succeed, greedy; `entropy_there` and `entropy_here`, the
        teacher's mean entropy in nats a token on states of its own and of the start, both drawn; `entropy_ratio`.
    """
    rows = {"prompts": episodes(per_task, VALIDATION)}
    start, teacher = inputs[START] / "start", inputs[TEACHER] / "run" / "student"
    asked = {"teacher": [{"kind": "policy", "model": str(teacher)}]}
    shares = {
        name: success(folder / name, model, rows["prompts"], seed)["accuracy"]
        for name, model in (("start", start), ("teacher", teacher))
    }
    drawn = {"evaluation": {"greedy": False}}
    there, here = (
        success(folder / name, model, rows["prompts"], seed, **asked, **drawn)["teacher_entropy"]
        for name, model in (("there", teacher), ("here", start))
    )
    return {**shares, "entropy_there": there, "entropy_here": here, "entropy_ratio": here / max(there, 1e-9)}


STAGE = Stage(premise, {"per_task": 20}, [START, TEACHER], per_seed=True)
GATES = [
    Gate("premise", "start", at_least=0.2),
    Gate("premise", "start", at_most=0.6),
    Gate("premise", "teacher", at_least=0.95),
]
"""Held by the start of every seed. Where the teacher is as sure on the student's states as on its own, as it was in
pilots, the paper's argument about divergences says nothing, and no explosion under forward KL is to be expected: claims
about entropy are no headlines then."""


def verdict(figures: Figures) -> tuple[bool, list[str]]:
    """Whether the premise holds for one seed, and a line for each of its conditions."""
    lines, holds = [], True
    for gate in GATES:
        value, _ = gate.measured("premise", figures)
        passed = gate.passes(value)
        holds &= passed
        lines.append(f"{gate.figure}: {value:.3f}, wanted {gate.limit}: {'yes' if passed else 'NO'}")
    return holds, lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make teacher and starts where they are missing and measure them.")
    parser.add_argument("folder", type=Path, help="gets a folder for the teacher and one for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    places: dict[str, Path] = {}
    for name, stage in STAGES.items():
        if not stage.per_seed:
            places[name] = options.folder / name
            _made(name, stage, places, None)
    for seed in options.seeds:
        own = dict(places)
        for name, stage in {**STAGES, "premise": STAGE}.items():
            if stage.per_seed:
                own[name] = options.folder / str(seed) / name
                figures = _made(name, stage, own, seed)
        print(*verdict(figures)[1], sep="\n", flush=True)


def _made(name: str, stage: Stage, places: Mapping[str, Path], seed: int | None) -> Figures:
    done = places[name] / "job.json"
    if not done.exists():
        places[name].mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        inputs = {wanted: places[wanted] for wanted in stage.inputs}
        own = {} if seed is None else {"seed": seed}
        figures = stage.function(places[name], inputs, **stage.params, **own)
        record = {"figures": figures, "cpu_seconds": time.process_time() - started}
        done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(done.read_text(encoding="utf-8"))
    found: Figures = record["figures"]
    where = "" if seed is None else f"seed {seed}, "
    print(f"{where}{name}: {record['cpu_seconds']:.0f} CPU seconds", flush=True)
    if "curve" in found:
        print({int(point["step"]): round(point["accuracy"], 3) for point in found["curve"]}, flush=True)
    return found


if __name__ == "__main__":
    main()
