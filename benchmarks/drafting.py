"""Drafted against plain decoding: `python -m benchmarks.drafting FOLDER [--task NAME] [--quick] --json PATH`.

Two targets. `answers`: the student of the recipe `quickstart`, trained at a temperature of 1, which writes one JSON
object; its chain drafter learns from the target's stored greedy answers (training-time test, as EAGLE-3 has it), then
by Draft-OPD. `instructions`: SmolLM2-135M as it is, on general text, whose drafter is trained by the recipes
`smollm2_draft_1_start` and `smollm2_draft_2_opd` alone.

Of each drafter, new, started and after Draft-OPD, is told how many tokens a pass of the target adds on held-out
prompts. Then the target writes to held-out prompts, one after the other, alone, with both trained drafters' help, and
with trees of the last one's proposals, taking turns: tokens a second of wall clock and of CPU, medians of five rounds,
at temperatures of 0 and 1; how many tokens a pass of the target added; and what share of the texts is the one written
alone token by token, which rounding alone may lower. What was trained in FOLDER is not trained again. `--quick` trains
for two steps, writes eight tokens and takes one round: it shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_operator import describe_machine, versions
from benchmarks.sizes import SMOLLM2
from benchmarks.whole import execute_whole
from opd.context import Context
from opd.drafting.proposing import Tree
from opd.engines.drafted import DraftedEngine, DraftedWriter
from opd.jobs.sampling import sample
from opd.language.agreement import agree_on_end
from opd.language.engines.base import Drawing, Row
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.language.tokens import Tokens
from opd.prompts import Prompt
from opd.recipe import load_recipe

DATA = Path(__file__).parent.parent / "recipes" / "data"
START, DRAFT_OPD = "smollm2_draft_1_start", "smollm2_draft_2_opd"
TEMPERATURES = (0, 1)
"""At 0 the likeliest token is taken."""

TREE = Tree(width=4, nodes=16)
HELD_OUT, WRITTEN, ROUNDS = 16, 6, 5
"""Prompts that nothing is trained on, how many of them a round writes to, and rounds."""
FOLLOWED = "rollout={kind: anchored, texts: {kind: stored, path: %s}, anchors: every, slots: text}"
OVER_TEXTS = "objective={kind: accepted, decay: 0.8}"
CHAIN = "student.drafter={kind: chain, proposals: 3, vocabulary: {size: 1024, store: %s}}"


@dataclass(frozen=True)
class Task:
    """A target, and how a drafter of it is trained.

    Attributes:
        prompts: file of them, in the recipes' data.
        new: most tokens of a text.
        started: changes of the recipe `smollm2_draft_1_start`; with `%s` where the target's stored texts go.
        draft_opd: changes of the recipe `smollm2_draft_2_opd`.
        taught: whether the target is made by the recipe `quickstart`.
    """

    prompts: str
    new: int
    started: Sequence[str] = ()
    draft_opd: Sequence[str] = ()
    taught: bool = False


TASKS = {
    "answers": Task(
        "questions.jsonl",
        32,
        [CHAIN, FOLLOWED, OVER_TEXTS, "steps=60", "update.learning_rate.start=2e-3", "batch.prompts=16"],
        ["steps=10", "rollout.text_temperature=0"],
        taught=True,
    ),
    "instructions": Task("instructions.jsonl", 32),
}


def split(task: Task, folder: Path) -> tuple[Path, Path]:
    """The task's prompts but for the last ones, and those."""
    lines = (DATA / task.prompts).read_text(encoding="utf-8").splitlines()
    parts = {"train": lines[:-HELD_OUT], "test": lines[-HELD_OUT:]}
    for name, some in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
    return folder / "train.jsonl", folder / "test.jsonl"


def answering(folder: Path, quick: bool) -> Path:
    """A target that answers with a JSON object, at any temperature."""
    place = folder / "target"
    if not (place / "summary.json").exists():
        changes = [f"output={place}", "temperature=1", "evaluation.samples=0", "evaluation.held_out=16"]
        changes += ["steps=1", "batch.prompts=4", "rollout.max_new_tokens=8"] if quick else []
        execute_whole(load_recipe("quickstart", changes), overwrite=True)
    return place / "student"


def trained(
    task: Task, target: str, folder: Path, train: Path, test: Path, quick: bool
) -> tuple[dict[str, Path], dict[str, dict[str, float]]]:
    """The folders of the drafters, `started` and `draft_opd`, and the held-out acceptance of these and a `new` one."""
    shared = [
        f"student.target.model={target}",
        f"prompts={train}",
        f"evaluation.prompts=[{{kind: file, path: {test}}}]",
        "evaluation.samples=0",
        *(["steps=2", "batch.prompts=4"] if quick else []),
    ]
    writes = [f"rollout.max_new_tokens={8 if quick else task.new}"]
    started = writes
    if task.started:
        # This one writes nothing while it learns.
        texts = folder / "texts"
        greedy = [*shared, *writes, "rollout.text_temperature=0", f"output={folder / 'unused'}"]
        sample(load_recipe(START, greedy), texts, quiet=True)
        started = [change % texts if "%s" in change else change for change in task.started]
    plans = {"started": (START, started), "draft_opd": (DRAFT_OPD, [*task.draft_opd, *writes])}
    found: dict[str, dict[str, float]] = {}
    folders: dict[str, Path] = {}
    for label, (name, changes) in plans.items():
        place = folder / label
        kept = folder / f"{label}.json"
        if not kept.exists():
            begun = [f"student.model={folders['started']}"] if label == "draft_opd" else []
            recipe = load_recipe(name, [*changes, *shared, *begun, f"output={place}"])
            result = execute_whole(recipe, overwrite=True)
            cost = sum(record.get("train/cpu_seconds", 0.0) for record in result.history)
            kept.write_text(json.dumps({"before": result.before, "after": result.after, "cpu_seconds": cost}))
        record = json.loads(kept.read_text())
        folders[label] = place / "student"
        for which, metrics in (("new", record["before"]), (label, record["after"])):
            found.setdefault(which, {k: v for k, v in metrics.items() if k.startswith("accept")})
        found[label]["cpu_seconds"] = record["cpu_seconds"]
        print(json.dumps(found, indent=2), flush=True)
    return folders, found


def speed(task: Task, target: str, folders: dict[str, Path], test: Path, quick: bool) -> dict[str, Any]:
    """Tokens a second of all ways, by temperature."""
    device = torch.device("cpu")
    language = LanguageModel.load(ModelSettings(model=target, dtype="float32"), device)
    texts = [str(json.loads(line)["prompt"]) for line in test.read_text(encoding="utf-8").splitlines()]
    texts = texts[: 1 if quick else WRITTEN]
    contexts = [language.encode(Prompt(str(i), {"prompt": text})) for i, text in enumerate(texts)]
    new, rounds, seeds = 8 if quick else task.new, 1 if quick else ROUNDS, range(len(texts))
    shapes = {"started": ("started", None), "draft_opd": ("draft_opd", None), "tree": ("draft_opd", TREE)}
    found: dict[str, Any] = {}
    for temperature in TEMPERATURES:
        # Behind its end no text is what anybody learnt.
        context = Context(device, agreed=Tokens(end_ids=agree_on_end(language, [], None)))
        drawing = Drawing(context, top_k=0 if temperature else 1, batch=1)
        helpers = {
            way: DraftedEngine(model=str(folders[which]), tree=tree).build(language, context)
            for way, (which, tree) in shapes.items()
        }
        who: dict[str, LanguageModel | DraftedWriter] = {"alone": language, **helpers}
        ways: dict[str, Callable[[], list[Row]]] = {
            way: partial(each.sample, contexts, 1, new, seeds, drawing) for way, each in who.items()
        }
        by_wall: dict[str, list[float]] = {way: [] for way in ways}
        by_cpu: dict[str, list[float]] = {way: [] for way in ways}
        first = {way: work() for way, work in ways.items()}
        signals = {way: helper.own_signals() for way, helper in helpers.items()}
        for _ in range(rounds):
            for way, work in ways.items():
                begun, spent = time.perf_counter(), time.process_time()
                count = sum(len(row.actions) for row in work())
                by_wall[way].append(count / (time.perf_counter() - begun))
                by_cpu[way].append(count / (time.process_time() - spent))
        found[str(temperature)] = {
            "tokens_a_second": {way: {"median": statistics.median(all_), "all": all_} for way, all_ in by_wall.items()},
            "ratio": ratios(by_wall),
            "ratio_of_cpu_seconds": ratios(by_cpu),
            "acceptance_length": {way: found["engine/acceptance_length"] for way, found in signals.items()},
            "tokens": statistics.mean(len(row.actions) for row in first["alone"]),
            "same_texts": {way: share_alike(first["alone"], first[way]) for way in helpers},
        }
        print(json.dumps(found, indent=2), flush=True)
    return found


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """The median over rounds of each way's rate by that of writing alone in the same round."""
    alone = rates["alone"]
    return {
        way: statistics.median(a / b for a, b in zip(all_, alone, strict=True))
        for way, all_ in rates.items()
        if way != "alone"
    }


def share_alike(rows: list[Row], others: list[Row]) -> float:
    """How many of the texts are the same, token by token."""
    return sum(torch.equal(a.actions, b.actions) for a, b in zip(rows, others, strict=True)) / len(rows)


def measured(name: str, place: Path, quick: bool) -> dict[str, Any]:
    task, folder = TASKS[name], (place / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train, test = split(task, folder)
    target = str(answering(folder, quick)) if task.taught else SMOLLM2
    folders, acceptance = trained(task, target, folder, train, test, quick)
    return {"acceptance": acceptance, "speed": speed(task, target, folders, test, quick)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the target and the drafters are kept")
    parser.add_argument("--task", choices=TASKS, action="append", help="default all")
    parser.add_argument("--quick", action="store_true", help="two steps and one round, to see that it runs")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": describe_machine("cpu"), "versions": versions()}
    for name in options.task or TASKS:
        found[name] = measured(name, options.folder, options.quick)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
