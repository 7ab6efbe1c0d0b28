"""What the reproductions on running sums share: models, recipes, and how a trained student is tested."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.api import assembled
from opd.evaluation import evaluate
from opd.language.creation import create_model, task_tokenizer
from opd.procedural import ANSWER_PATTERN
from opd.prompts import load_prompts
from opd.recipe import parse_recipe
from opd.reproductions import train
from opd.reproductions.definition import Figures, merged
from opd.reproductions.training import filled
from opd.rollouts import HeldOutSampler, Request
from opd.rollouts.teacher import TeacherRollout

QUARTERS = 4


def prompts(terms: tuple[int, int], size: int, split: str, seed: int = 0) -> dict[str, Any]:
    """The recipe's block of prompts: running sums whose steps have three legal writings."""
    task = {"kind": "running_sum", "terms": list(terms)}
    return {"kind": "procedural", "task": task, "size": size, "split": split, "seed": seed}


def recipe(
    student: str,
    terms: tuple[int, int],
    budget: int,
    steps: int,
    rate: float,
    teacher: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A recipe on running sums; `changes` replace keys or are merged into blocks."""
    base = {
        "steps": steps,
        "student": {"model": student, "template": "plain"},
        "teacher": [] if teacher is None else [{"model": teacher, "template": "plain"}],
        "prompts": prompts(terms, 8000, "train"),
        "verifier": {"kind": "exact_match", "pattern": ANSWER_PATTERN},
        "rollout": {"kind": "student", "max_new_tokens": budget},
        "update": {"learning_rate": {"kind": "cosine", "start": rate, "end": rate / 10, "warmup": 10}},
        "batch": {"prompts": 32, "micro": 32},
        "evaluation": {"prompts": prompts(terms, 128, "validation"), "max_new_tokens": budget, "samples": 0},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    return merged(base, changes)


def new_model(folder: Path, inputs: Mapping[str, Path], *, width: int, layers: int, heads: int, seed: int) -> Figures:
    """A model with random weights and the task's tokenizer, in `folder/model`."""
    create_model(folder / "model", task_tokenizer("running_sum"), width=width, layers=layers, heads=heads, seed=seed)
    return {}


def student_tested(
    folder: Path,
    inputs: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    test: Mapping[str, Any],
    seed: int,
    states: bool = False,
) -> Figures:
    """Train, then measure the student on test prompts that decided nothing.

    `test` is an `evaluation` block. With `states` also the distance to the teacher by position, on the student's own
    states and on the teacher's: `own_q1` ... `own_q4` and `teacher_q1` ... are mean forward KLs over the first to last
    quarter of each trajectory, and `exposure` is `own_q4 - teacher_q4`.
    """
    figures = train(folder, inputs, recipe=recipe, seed=seed)
    after = {
        **filled(recipe, inputs),
        "evaluation": {**test},
        "tracking": {"trackers": []},
        "seed": seed,
        "output": str(folder / "test"),
    }
    after["student"] = {"model": str(folder / "run" / "student"), "template": "plain"}
    run = assembled(parse_recipe(after, "recipe of this test"))
    found = evaluate(run)
    items = {f"test_{name}": verdicts for name, verdicts in found.items.items()}
    figures |= {f"test_{name}": value for name, value in found.metrics.items()}
    if states:
        own = by_quarter(found.rows)
        writing = TeacherRollout(max_new_tokens=run.recipe.rollout.budget)
        source = writing.build(run.context, run.student, run.teachers)
        theirs = by_quarter(evaluate(run, HeldOutSampler(source, writing, run.at(0).context)).rows)
        figures |= {f"own_q{i + 1}": v for i, v in enumerate(own)}
        figures |= {f"teacher_q{i + 1}": v for i, v in enumerate(theirs)}
        figures["exposure"] = own[-1] - theirs[-1]
    return {**figures, "items": items}


def tested(folder: Path, inputs: Mapping[str, Path], *, student: str, test: Mapping[str, Any], seed: int) -> Figures:
    """A saved student on test prompts, under `test_...`: Avg@k, Pass@k, entropy, length, share of cut answers."""
    settings = {
        "student": {"model": student, "template": "plain"},
        "prompts": prompts((5, 6), 2, "train"),
        "objective": ["sft"],
        "rollout": {"kind": "data"},
        "verifier": {"kind": "exact_match", "pattern": ANSWER_PATTERN},
        "evaluation": test,
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
        "seed": seed,
        "output": str(folder / "test"),
    }
    found = evaluate(assembled(parse_recipe(filled(settings, inputs), "recipe of this test")))
    figures = {f"test_{name}": value for name, value in found.metrics.items()}
    return {**figures, "items": {f"test_{name}": verdicts for name, verdicts in found.items.items()}}


def responses_of_teacher(
    folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], size: int, seed: int
) -> Figures:
    """One response of the teacher to each training prompt, in `folder/responses.jsonl`, and what they cost."""
    block = merged(filled(recipe, inputs), {"prompts": {"size": size}, "tracking": {"trackers": []}, "seed": seed})
    started = time.process_time()
    run = assembled(parse_recipe(merged(block, {"output": str(folder / "run")}), "recipe of the responses"))
    budget = run.recipe.rollout.budget
    writing = TeacherRollout(max_new_tokens=budget)
    source = writing.build(run.context, run.student, run.teachers)
    asked = load_prompts(run.recipe.prompts)
    tokens = 0
    with (folder / "responses.jsonl").open("w", encoding="utf-8") as file:
        for first in range(0, len(asked), 64):
            request = Request(asked[first : first + 64], 1, budget, 0, writing, run.at(0).context)
            trajectories = source(request)
            tokens += trajectories.positions
            for prompt, actions in zip(trajectories.prompts, trajectories.completions(), strict=True):
                fields = {k: prompt.fields[k] for k in ("id", "prompt", "answer")}
                file.write(json.dumps({**fields, "response": run.student.decode(actions)}) + "\n")
    return {"cpu_seconds": time.process_time() - started, "sampled_tokens": float(tokens)}


def by_quarter(rows: list[dict[str, Any]]) -> list[float]:
    """Mean forward KL of the tokens in each quarter of their trajectories, end tokens included."""
    sums, counts = [0.0] * QUARTERS, [0] * QUARTERS
    for row in rows:
        values = row["values"]["forward_kl"]
        for i, value in enumerate(values):
            quarter = i * QUARTERS // len(values)
            sums[quarter] += value
            counts[quarter] += 1
    return [s / max(1, n) for s, n in zip(sums, counts, strict=True)]


def reached(curve: list[dict[str, float]], metric: str, goal: float) -> dict[str, float]:
    """What training had cost when `metric` first reached `goal` on validation, by linear interpolation between
    evaluations; the whole cost where it never did, and `reached` says which."""
    names = ("cpu_seconds", "sampled_tokens")
    before = curve[0]
    for point in curve:
        if point[metric] >= goal:
            rise = point[metric] - before[metric]
            share = (goal - before[metric]) / rise if rise > 0 else 0.0
            return {
                "reached": 1.0,
                **{f"{n}_to_goal": before[n] + share * (point[n] - before[n]) for n in names},
            }
        before = point
    return {"reached": 0.0, **{f"{n}_to_goal": before[n] for n in names}}


def figures_of(folder: Path) -> Figures:
    """What a finished stage measured."""
    record: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return dict(record["figures"])
