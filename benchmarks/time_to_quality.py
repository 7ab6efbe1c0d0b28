"""How soon the student is good: `python -m benchmarks.time_to_quality --json PATH`.

Running sums modulo 10 of two to ten digits, where an answer is right or wrong and as long as the problem. The teacher
is made by supervised training, and the student is that teacher without half of its MLP neurons, which distillation has
to heal; then every method trains the same student with the same batch, optimiser and schedule, over seeds. Counted is
what training has cost when the accuracy of greedy answers to validation prompts, the mean of three measurements, first
reaches 90 % of the teacher's, where a run ends: CPU seconds of the process without measuring, and sampled tokens, the
teacher's included. Every method takes, of four learning rates, the one that reaches the goal in fewest steps under a
seed of its own; `opd` and TRL on-policy, which descend the same, take one rate that is best for both. Each run is a
process of one thread and leaves a file; what is there is not run again. Runs start in order, the methods in turns under
each seed, `--jobs` at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.alternation import QUIET, silence, versions_and_machine, write
from benchmarks.head_to_head import last_line, progress
from benchmarks.phases import Phases
from opd.provenance import git_state
from opd.reproductions.definition import merged
from reproductions.on_policy import FEW, at_rate
from reproductions.running_sum import prompts, reached, recipe, tested

ROOT = Path(__file__).parent.parent
OPD, TRL, GKD, SFT = "opd", "TRL on-policy", "TRL GKD, lambda 0.5", "SFT on teacher samples"
OWN = {OPD: {}, SFT: {"rollout": {"kind": "teacher"}, "objective": ["sft"]}}
METHODS = (OPD, TRL, GKD, SFT)
TERMS, BUDGET = (2, 10), 96
TEACHER_STEPS, STEPS = 4600, 400
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
KEPT = 0.5
"""Share of the teacher's MLP neurons that the student begins with."""
VOCABULARY = 2048
"""Ids of the models; the task needs twenty, and no language model has so few."""
VALIDATION = {"prompts": prompts(TERMS, 512, "validation"), "max_new_tokens": BUDGET, "samples": 0, "greedy": True}
EVERY = 10
METRIC = "greedy_accuracy"
ONE_RATE = ((OPD, TRL), (GKD,), (SFT,))
"""Methods that share a learning rate: those that descend the same."""
SMOOTH = 3
"""Measurements in a row whose mean is held against the goal: the first passage of a wavering curve is luck."""
TUNING_SEED = 100
SHARE = 0.9
GOAL = 3.0
"""CPU seconds to the goal of TRL on-policy over opd's: at least."""


class GoalReached(Exception):  # noqa: N818  (no error)
    """Ends a run of opd's loop from inside its measurement."""


class Curve:
    """Points of accuracy against what training has cost so far; measuring is not counted.

    Args:
        goal: accuracy at which a run may end; None is never.
    """

    def __init__(self, goal: float | None = None) -> None:
        self.phases, self.points = Phases(), []
        self.sampled, self.goal = 0, goal

    @property
    def there(self) -> bool:
        return self.goal is not None and bool(self.points) and smoothed(self.points)[-1][METRIC] >= self.goal

    @contextlib.contextmanager
    def measuring(self, step: int) -> Any:
        """Measure inside; the point is made of what is put into the mapping."""
        if not self.points:
            self.phases.restart()
        cost = {"step": step, "cpu_seconds": self.cpu_seconds, "sampled_tokens": float(self.sampled)}
        found: dict[str, float] = {}
        with self.phases("measuring"):
            yield found
        self.points.append({**cost, **found})

    @property
    def cpu_seconds(self) -> float:
        return sum(s for phase, s in self.phases.take()["cpu"].items() if phase != "measuring")


def smoothed(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """Every accuracy the mean of itself and the two before it."""
    rows = [points[max(0, i + 1 - SMOOTH) : i + 1] for i in range(len(points))]
    return [{**row[-1], METRIC: statistics.mean(point[METRIC] for point in row)} for row in rows]


def train_own(recipe: dict[str, Any], folder: Path, goal: float | None) -> list[dict[str, float]]:
    """A recipe through opd's own loop."""
    from opd.assembly import assemble
    from opd.loop import train
    from opd.monitor import Monitor
    from opd.recipe import parse_recipe

    curve, evaluate = Curve(goal), Monitor._evaluate

    def measured(monitor: Monitor, run: Any) -> Any:
        curve.sampled = int(sum(record.get("train/sampled_tokens", 0.0) for record in monitor.history))
        with curve.measuring(run.step) as point:
            result = evaluate(monitor, run)
            point[METRIC] = result.metrics[METRIC]
        if curve.there:
            raise GoalReached
        return result

    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(Monitor, "_evaluate", measured), contextlib.suppress(GoalReached):
        train(
            assemble(parse_recipe({**recipe, "output": str(folder)}, "recipe of this run"), Monitor(folder, quiet=True))
        )
    return curve.points


def train_trl(method: str, recipe: dict[str, Any], folder: Path, goal: float | None) -> list[dict[str, float]]:
    """The same run through one of TRL's trainers: prompts, models, optimiser and schedule are read from the recipe."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from opd.api import assembled
    from opd.evaluation import evaluate
    from opd.prompts import load_prompts
    from opd.recipe import parse_recipe

    torch.set_num_threads(1)
    # Measured by opd's own evaluation, on the model that TRL trains.
    run = assembled(parse_recipe({**recipe, "output": str(folder)}, "recipe of this run"), quiet=True)
    parsed, curve = run.recipe, Curve(goal)
    source, teacher_source = parsed.student.model, parsed.teacher[0].model
    teacher = AutoModelForCausalLM.from_pretrained(teacher_source, dtype=torch.float32)
    student = run.student.language.model
    attention = student.config._attn_implementation
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    rows = [{k: p.fields[k] for k in ("prompt", "response")} for p in load_prompts(parsed.prompts)]
    update, steps = parsed.update, parsed.steps
    rates = [float(parsed.at(step, steps).update.learning_rate) for step in range(steps + 1)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1.0, betas=update.betas, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, steps)])
    shared = {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": parsed.batch.prompts,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": update.clip_norm,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": parsed.seed,
        "beta": 1.0,
        "temperature": 1.0,
    }
    given = {"model": student, "teacher_model": teacher, "processing_class": tokenizer}
    given["optimizers"] = (optimizer, schedule)
    budget = parsed.rollout.budget
    if method == TRL:
        from trl import DistillationConfig, DistillationTrainer

        trainer: Any = DistillationTrainer(
            **given,
            args=DistillationConfig(**shared, max_completion_length=budget),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        )
        _count(curve, trainer, "_generate_single_turn", lambda made: sum(map(len, made)))
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        # Half of the batches are the student's samples and half the teacher's, both drawn as they are needed. A row's
        # own response is never learnt from; its length sets the loss's denominator.
        trainer = GKDTrainer(
            **given,
            args=GKDConfig(**shared, max_new_tokens=budget, lmbda=0.5, seq_kd=True, max_length=512),
            train_dataset=Dataset.from_list([_tokenised(tokenizer, row) for row in rows]),
        )
        _count(curve, trainer, "generate_on_policy_outputs", lambda made: int((made[2] != -100).sum()))

    class Measure(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self._measure(0)

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step % EVERY == 0 or state.global_step == steps:
                self._measure(state.global_step)
                control.should_training_stop = control.should_training_stop or curve.there

        def _measure(self, step: int) -> None:
            with curve.measuring(step) as point:
                point[METRIC] = evaluate(run).metrics[METRIC]
            student.config._attn_implementation = attention  # opd's measuring packs rows, TRL does not

    trainer.add_callback(Measure())
    trainer.train()
    return curve.points


def _tokenised(tokenizer: Any, row: Mapping[str, str]) -> dict[str, Any]:
    prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["response"])["input_ids"]
    return {
        "prompt": row["prompt"],
        "input_ids": [*prompt, *answer, tokenizer.eos_token_id],
        "completion_mask": [0] * len(prompt) + [1] * (len(answer) + 1),
    }


def _count(curve: Curve, trainer: Any, name: str, tokens: Any) -> None:
    function = getattr(trainer, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        curve.sampled += tokens(made)
        return made

    setattr(trainer, name, counted)


def prepare(folder: Path, quick: bool) -> tuple[Path, Path, float]:
    """The student's beginning, the teacher, and its greedy accuracy on the validation prompts; made once."""
    from opd.language.creation import create_model, task_tokenizer
    from opd.reproductions import train

    new, place, begun, record = (folder / name for name in ("new", "teacher", "begun", "teacher.json"))
    if not (record.exists() and begun.exists()):
        progress("training the teacher")
        for left in (new, place, begun):
            shutil.rmtree(left, ignore_errors=True)
        place.mkdir(parents=True)
        tokenizer = task_tokenizer("running_sum")
        tokenizer.add_tokens([f"<{i}>" for i in range(VOCABULARY - len(tokenizer))])
        create_model(new, tokenizer, width=64, layers=2, heads=4)
        few = {"evaluation": FEW} if quick else {}
        taught = {"rollout": {"kind": "data"}, "objective": ["sft"], "batch": {"prompts": 64, "micro": 64}}
        block = recipe(str(new), TERMS, BUDGET, 20 if quick else TEACHER_STEPS, 3e-3, **taught)
        train(place, {}, recipe=merged(block, few), seed=0)
        prune(place / "run" / "student", begun, KEPT)
        validation = merged(VALIDATION, FEW if quick else {})
        write(record, tested(place / "v", {}, student=str(place / "run" / "student"), test=validation, seed=0))
    best = json.loads(record.read_text())[f"test_{METRIC}"]
    return begun, place / "run" / "student", best


def prune(source: Path, target: Path, kept: float) -> None:
    """Leave of each layer's MLP the share `kept` of its neurons with the largest product of the norms of their weights;
    the tokenizer comes along."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    size = round(kept * model.config.intermediate_size)
    for layer in model.model.layers:
        gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        score = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        best = score.topk(size).indices.sort().values
        gate.data, up.data, down.data = gate.data[best], up.data[best], down.data[:, best].contiguous()
    model.config.intermediate_size = size
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def recipe_of(method: str, begun: Path, teacher: Path, rate: float, seed: int, quick: bool) -> dict[str, Any]:
    """What a method trains with."""
    quiet = {"tracking": {"trackers": []}, "checkpoint": {"every": 0}, "seed": seed}
    block = recipe(str(begun), TERMS, BUDGET, STEPS, 0.0, str(teacher), evaluation={"every": EVERY, **VALIDATION})
    block = at_rate(merged(block, {**OWN.get(method, {}), **quiet}), rate)
    return merged(block, {"steps": 4, "evaluation": {"every": 2, **FEW}}) if quick else block


def run_one(method: str, recipe: dict[str, Any], record: Path, goal: float | None) -> None:
    """One run in this process; its curve goes to `record`."""
    sys.stdout = sys.stderr
    silence()
    folder = record.with_suffix("")
    train = train_own if method in OWN else lambda *args: train_trl(method, *args)
    points = train(recipe, folder, goal)
    write(record, {"method": method, "recipe": placeless(recipe, record.parent), "git": git_state(), "points": points})
    shutil.rmtree(folder, ignore_errors=True)


def placeless(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe as it reads wherever the folder of the runs lies."""
    text: dict[str, Any] = json.loads(json.dumps(recipe).replace(str(folder), "."))
    return text


def run_all(
    folder: Path, begun: Path, teacher: Path, best: float, quick: bool, seeds: int, jobs: int = 1
) -> dict[str, Any]:
    """Every method until the goal, first at each rate, then over seeds at its best; figures by method."""
    goal = SHARE * best
    os.environ.update(QUIET, OMP_NUM_THREADS="1")

    def points(method: str, rate: float, seed: int) -> list[dict[str, float]]:
        slug = "".join(c if c.isalnum() else "-" for c in method)
        record = folder / f"{slug}-{rate:g}-{seed}.json"
        recipe = recipe_of(method, begun, teacher, rate, seed, quick)
        if not record.exists():
            progress(f"{method}, learning rate {rate:g}, seed {seed}")
            arguments = (method, recipe, record, goal)
            process = multiprocessing.get_context("spawn").Process(target=run_one, args=arguments)
            process.start()
            process.join()
            if not record.exists():
                raise SystemExit(f"{method}, seed {seed}: the run ended without figures; its error stands above")
        kept = json.loads(record.read_text())
        if kept["recipe"] != placeless(recipe, folder):
            raise SystemExit(f"{record} was run with another recipe; remove it or give another --folder")
        return kept["points"]

    def all_points(runs: Iterable[tuple[Any, ...]]) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(lambda run: points(*run), runs):
                pass

    def swiftness(methods: tuple[str, ...], rate: float) -> tuple[float, float]:
        """Fewest steps to the goal first; of runs that don't get there, the best last accuracy."""
        ends = [smoothed(points(method, rate, TUNING_SEED))[-1] for method in methods]
        missed = sum(end[METRIC] < goal for end in ends)
        return -sum(end["step"] for end in ends) - STEPS * missed, sum(end[METRIC] for end in ends)

    rates, tuned = RATES[:1] if quick else RATES, dict[str, float]()
    all_points((method, rate, TUNING_SEED) for rate in rates for method in METHODS)
    for methods in ONE_RATE:
        tuned |= dict.fromkeys(methods, max(rates, key=lambda rate, of=methods: swiftness(of, rate)))
    all_points((method, tuned[method], seed) for seed in range(seeds) for method in METHODS)
    found: dict[str, Any] = {m: {"rate": tuned[m], "runs": []} for m in METHODS}
    for seed in range(seeds):
        for method in METHODS:
            curve = points(method, tuned[method], seed)
            smooth = smoothed(curve)
            last = {"steps": curve[-1]["step"], "last_accuracy": smooth[-1][METRIC]}
            found[method]["runs"].append({"seed": seed, **reached(smooth, METRIC, goal), **last, "points": curve})
    selection = {
        method: {f"{rate:g}": smoothed(points(method, rate, TUNING_SEED))[-1] for rate in rates} for method in METHODS
    }
    return {"teacher_accuracy": best, "goal_accuracy": goal, "selection_ends": selection, "methods": found}


def judge(methods: dict[str, Any]) -> list[dict[str, Any]]:
    """TRL's median CPU seconds over opd's; no figure, and missed, when one did not get there with every seed."""
    runs = [methods[name]["runs"] for name in (OPD, TRL) if name in methods]
    figure, met = None, False if runs else None
    if runs and all(run["reached"] for of in runs for run in of):
        own, other = (statistics.median(run["cpu_seconds_to_goal"] for run in of) for of in runs)
        figure = other / own
        met = figure >= GOAL
    return [{"goal": f"CPU seconds to the goal, TRL on-policy / opd >= {GOAL:g}", "figure": figure, "met": met}]


def show(report: dict[str, Any]) -> None:
    """Medians and ranges over seeds."""
    table = Table(title=f"to greedy accuracy {report['goal_accuracy']:.3f} (teacher {report['teacher_accuracy']:.3f})")
    for column in ("", "learning rate", "reached", "CPU s to goal", "sampled tokens to goal", "last accuracy"):
        table.add_column(column, justify="right")
    for name, of in report["methods"].items():
        runs = of["runs"]

        def spread(key: str, digits: str, runs: Any = runs) -> str:
            values = [run[key] for run in runs]
            return f"{statistics.median(values):{digits}} ({min(values):{digits}}-{max(values):{digits}})"

        table.add_row(
            name,
            f"{of['rate']:g}",
            f"{sum(int(run['reached']) for run in runs)} of {len(runs)}",
            spread("cpu_seconds_to_goal", ".0f"),
            spread("sampled_tokens_to_goal", ".0f"),
            spread("last_accuracy", ".3f"),
        )
    Console(width=max(130, Console().width)).print(table)


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, one seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each; no more than cores")
    parser.add_argument("--folder", type=Path, help="where runs are kept; default under runs/benchmarks")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    name = "time_to_quality_quick" if options.quick else "time_to_quality"
    folder = options.folder or ROOT / "runs" / "benchmarks" / name
    models = prepare(folder, options.quick)  # in opd's own environment, before the peers' takes over
    if not peers.present():
        peers.reexecute("benchmarks.time_to_quality", sys.argv[1:])
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.time_to_quality", *sys.argv[1:]]),
        **versions_and_machine(),
        "task": {"kind": "running_sum", "terms": TERMS, "budget": BUDGET, "steps": STEPS, "every": EVERY},
        "selection": {"rates": RATES, "seed": TUNING_SEED},
        "kept": KEPT,
        "vocabulary": VOCABULARY,
        **run_all(folder, *models, options.quick, 1 if options.quick else options.seeds, options.jobs),
    }
    report["goals"] = judge({} if options.quick else report["methods"])
    write(options.json, report)
    show(report)
    sys.stdout.flush()
    print(last_line("time_to_quality", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
