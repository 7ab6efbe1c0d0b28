"""The task of the reproduction of Video-OPD, its teacher, and the student that every arm starts from.

Clips of 8 seconds hold two coloured shapes that come and go, and the question is when one of them is there. The
teacher learnt it for six of the eight colours that are asked for. The student is what the teacher was before its last
steps, fine-tuned on annotations that begin too early and end too late, of all colours; it also learnt to count shapes,
which no arm trains. Both see, since they said of each frame whether a shape is there: of intervals alone they learn to
write some. A smaller student that hardly sees learns nothing in the time of an arm, from any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opd.api import execute
from opd.errors import RunError
from opd.prompts.clips import VOCABULARY
from opd.prompts.tiles import COLOURS
from opd.recipe import parse_recipe
from opd.reproductions import Stage
from opd.reproductions.definition import Figures, merged
from opd.reproductions.training import curve, filled
from opd.vision.creation import create_clip_model

SECONDS, PIXELS, EVENTS = 8, 16, 2
"""Of a clip: half of the largest, and a fourth of its tokens' pictures, so that many seeds are affordable. Of four
small shapes on any grey these models see nothing."""
KNOWN = list(COLOURS)[:6]
"""Colours that the teacher was asked for; of the others it never saw an interval."""
UNKNOWN = list(COLOURS)[6:]
CAP = 12
"""Most new tokens: an answer has nine and its end."""
SLACK = 1.0
"""Seconds by which the student's annotations begin too early and end too late."""
MIX = {"when": 12, "shown": 4, "count": 16}
"""Rows of each kind in a step of the student's training, on average. The teacher learns the first two."""
CLIPS_OF_TEACHER, STEPS_OF_TEACHER, STEPS_MORE = 12_000, 2500, 1000
"""The last are on as many other clips, three of them asked when for one asked in which frames, at a lower rate."""
CLIPS_OF_START, COUNTS_OF_START, STEPS_OF_START, RATE_OF_START = 4000, 4000, 200, 1e-3
SIZES = {"width": 96, "layers": 3, "heads": 4, "vision_width": 64, "vision_layers": 1}

Split = Literal["train", "validation", "test"]
VERIFIER: dict[str, Any] = {
    "kind": "routed",
    "by": "task",
    "routes": {"when": "temporal_grounding", "shown": "exact_match", "count": "exact_match"},
}


def clips(size: int, split: Split, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The recipe's block of questions when."""
    own = {"size": size, "split": split, "seed": seed, "seconds": SECONDS, "pixels": PIXELS, "events": EVENTS}
    return {"kind": "clips", **own, "plain": True, "add": {"task": "when"}} | changes


def shown(size: int, split: Split, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The same of questions in which frames."""
    return clips(size, split, seed, ask="shown", add={"task": "shown"}, **changes)


def counts(size: int, split: Split, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The same of questions how many."""
    return clips(size, split, seed, ask="count", events=4, add={"task": "count"}) | changes


def model(folder: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "image_text", "model": folder, "images": None, "videos": {"fps": 2}} | changes


def recipe(student: str, steps: int, rate: float, **changes: Any) -> dict[str, Any]:
    """A recipe on clips; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": model(student),
        "teacher": [],
        "verifier": VERIFIER,
        "rollout": {"kind": "student", "max_new_tokens": CAP},
        "reduction": "sequence_mean",
        "update": {
            "learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": 4},
            "betas": [0.9, 0.98],
        },
        "batch": {"prompts": 32, "micro": 32},
        "evaluation": {"max_new_tokens": CAP, "samples": 0, "alarm": None},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "self_test": False,
    }
    return merged(base, changes)


def blank(folder: Path, inputs: Mapping[str, Path], *, sizes: Mapping[str, int], seed: int) -> Figures:
    """A model with random weights and its processor, in `folder/model`."""
    characters, words, times, _ = VOCABULARY
    stamps = [time for time in times if time < SECONDS]
    create_clip_model(folder / "model", characters, words, stamps, PIXELS, seed=seed, **sizes)  # type: ignore[arg-type]
    return {}


def supervised(
    student: str, steps: int, prompts: Sequence[Mapping[str, Any]], rate: Mapping[str, Any]
) -> dict[str, Any]:
    """Fine-tuning on true answers."""
    return recipe(
        student,
        steps,
        0.0,
        prompts=list(prompts),
        rollout={"kind": "data", "max_new_tokens": 2 * SECONDS + 1},
        objective=["sft"],
        update={"learning_rate": {"warmup": 50, **rate}},
        evaluation={"prompts": [clips(96, "validation", 2)], "every": 0},
    )


def taught(folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], seed: int) -> Figures:
    """Train a teacher or a start; it lies in `folder/run/student`."""
    values = {"tracking": {"trackers": []}, **filled(recipe, inputs), "seed": seed, "output": str(folder / "run")}
    result = execute(parse_recipe(values, "recipe of this training"), quiet=True)
    if result.stopped_by is not None:
        raise RunError(f"training was stopped by signal {result.stopped_by}")
    return {"curve": list(curve(result.history))}


NEW_TEACHER, HALF_TAUGHT, TEACHER, START = "new teacher", "half-taught teacher", "teacher", "start"
OF_RATES = {START: f"{START} of rates"}
"""The same with a seed that no arm has, for the choice of learning rates."""
SEED_OF_RATES, SEED_OF_TEACHER = 100, 200


def _start(**own: Any) -> Stage:
    rows = [
        clips(CLIPS_OF_START, "train", 1, weight=MIX["when"], slack=SLACK),
        shown(CLIPS_OF_START, "train", 1, weight=MIX["shown"]),
        counts(COUNTS_OF_START, "train", 1, weight=MIX["count"]),
    ]
    rate = {"start": RATE_OF_START, "end": RATE_OF_START / 10}
    block = supervised(f"{{{HALF_TAUGHT}}}/run/student", STEPS_OF_START, rows, rate)
    return Stage(taught, {"recipe": block, **own}, [HALF_TAUGHT], per_seed=not own)


def _teacher(of: str, folder: str, steps: int, rate: float, seed: int, weights: tuple[float, float] | None) -> Stage:
    """`weights` are of the two questions; without them each set is read through in turn."""
    rows = [part(CLIPS_OF_TEACHER, "train", seed, colours=KNOWN) for part in (clips, shown)]
    if weights is not None:
        rows = [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)]
    block = supervised(f"{{{of}}}/{folder}", steps, rows, {"start": rate, "end": rate / 10})
    return Stage(taught, {"recipe": block, "seed": SEED_OF_TEACHER}, [of])


STAGES: dict[str, Stage] = {
    NEW_TEACHER: Stage(blank, {"sizes": SIZES, "seed": SEED_OF_TEACHER}),
    HALF_TAUGHT: _teacher(NEW_TEACHER, "model", STEPS_OF_TEACHER, 2e-3, 5, None),
    TEACHER: _teacher(HALF_TAUGHT, "run/student", STEPS_MORE, 5e-4, 6, (3.0, 1.0)),
    START: _start(),
    OF_RATES[START]: _start(seed=SEED_OF_RATES),
}
