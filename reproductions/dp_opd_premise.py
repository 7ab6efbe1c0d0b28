"""The premise of DP-OPD, measured before any arm: the teacher knows the grammar, and the student has something to gain.

python -m reproductions.dp_opd_premise runs/dp-opd-premise --seeds 0
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
from reproductions.dp_opd_models import SHIFT, STAGES, TEST, losses
from reproductions.dp_opd_reviews import entropy


def premise(folder: Path, inputs: Mapping[str, Path], *, size: int, shift: float, seed: int) -> Figures:
    """What decides whether the claims can be tested, in nats a word on test reviews.

    Returns:
        `floor`, the grammar's entropy; `teacher`, `start` and `blank teacher` beyond it on private reviews;
        `teacher_public`, the teacher's beyond the public floor; `room`, start less teacher; `knows`, an untrained
        teacher's less the teacher's.
    """
    means = {
        name: float(losses(inputs[name] / "run" / "student", size=size, shift=shift).mean())
        for name in ("teacher", "start", "blank teacher")
    }
    public = float(losses(inputs["teacher"] / "run" / "student", size=size, shift=0.0).mean())
    floor = entropy(size, shift, TEST)
    beyond = {name: loss - floor for name, loss in means.items()}
    return {
        "floor": floor,
        **beyond,
        "teacher_public": public - entropy(size, 0.0, TEST),
        "room": beyond["start"] - beyond["teacher"],
        "knows": beyond["blank teacher"] - beyond["teacher"],
    }


STAGE = Stage(premise, {"size": 400, "shift": SHIFT}, ["teacher", "blank teacher", "start"], per_seed=True)
GATES = [
    Gate("premise", "teacher_public", at_most=0.15),
    Gate("premise", "room", at_least=0.1),
    Gate("premise", "knows", at_least=1.0),
]
"""The teacher is near the floor of public reviews; on private ones the start is worse than the teacher, so that there
is something to learn from it; and what the teacher knows is not what every model knows."""


def verdict(figures: Figures) -> tuple[bool, list[str]]:
    """Whether the premise holds for one seed, and a line for each of its conditions."""
    lines, holds = [], True
    for gate in GATES:
        value, _ = gate.measured("premise", figures)
        holds &= gate.passes(value)
        lines.append(f"{gate.figure}: {value:.3f}, wanted {gate.limit}: {'yes' if gate.passes(value) else 'NO'}")
    return holds, lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the models where they are missing and measure the premise.")
    parser.add_argument("folder", type=Path, help="gets a folder for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        places: dict[str, Path] = {}
        wanted = ("blank teacher", "teacher", "blank", "start")
        for name, stage in {**{name: STAGES[name] for name in wanted}, "premise": STAGE}.items():
            places[name] = options.folder / (str(seed) if stage.per_seed else "once") / name
            done = places[name] / "job.json"
            if not done.exists():
                places[name].mkdir(parents=True, exist_ok=True)
                started = time.process_time()
                own = {"seed": seed} if stage.per_seed else {}
                inputs = {each: places[each] for each in stage.inputs}
                figures = stage.function(places[name], inputs, **stage.params, **own)
                record = {"figures": figures, "cpu_seconds": time.process_time() - started}
                done.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            record = json.loads(done.read_text(encoding="utf-8"))
            print(f"seed {seed}, {name}: {record['cpu_seconds']:.0f} CPU seconds", flush=True)
        print({name: round(value, 3) for name, value in record["figures"].items()}, flush=True)
        print(*verdict(record["figures"])[1], sep="\n", flush=True)


if __name__ == "__main__":
    main()
