"""Drafted against plain decoding: `python -m benchmarks.drafting [--quick] --json PATH`.

A chain drafter of SmolLM2-135M is trained by the recipes `smollm2_draft_1_start` (forward KL everywhere) and
`smollm2_draft_2_opd` (Draft-OPD). Of both is told how many tokens a pass of the target adds, on held-out prompts. Then
the target writes to four prompts, one after the other, alone, with the drafter's help, and with trees of its proposals,
taking turns: tokens a second, medians of five rounds, at temperatures of 0 and 1; how many tokens a pass of the target
added; and what share of the texts is the one written alone token by token, which rounding alone may lower. `--quick`
trains for two steps, writes eight tokens and takes one round: it shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_operator import describe_machine, versions
from benchmarks.sizes import SMOLLM2
from opd.api import execute
from opd.context import Context
from opd.drafting.proposing import Tree
from opd.engines.drafted import DraftedEngine, DraftedWriter
from opd.language.engines.base import Drawing, Row
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.language.tokens import Tokens
from opd.prompts import Prompt
from opd.prompts.file import FilePrompts
from opd.recipe import load_recipe

RECIPES = ("smollm2_draft_1_start", "smollm2_draft_2_opd")
DATA = Path(__file__).parent.parent / "recipes" / "data" / "instructions.jsonl"
TEMPERATURES = (0, 1)
"""At 0 the likeliest token is taken."""

SHAPES = {"with a drafter": None, "with a tree": Tree(width=4, nodes=16)}

ROWS, NEW, ROUNDS = 4, 64, 5
"""Texts of a round, tokens of each, rounds."""


def trained(place: Path, quick: bool) -> tuple[Path, dict[str, dict[str, float]]]:
    """The folder of the drafter after both recipes, and their held-out acceptance: `new`, `started`, `draft_opd`."""
    found: dict[str, dict[str, float]] = {}
    folder = place
    for name, label in zip(RECIPES, ("started", "draft_opd"), strict=True):
        changes = [f"output={place / name}", "evaluation.samples=0"]
        if folder != place:
            changes.append(f"student.model={folder}")
        if quick:
            changes += ["steps=2", "batch.prompts=4", "evaluation.held_out=2", "rollout.max_new_tokens=8"]
        result = execute(load_recipe(name, changes), quiet=True)
        for which, metrics in (("new", result.before), (label, result.after)):
            found.setdefault(which, {k: v for k, v in metrics.items() if k.startswith("accept")})
        folder = result.directory / "student"
        print(json.dumps(found, indent=2), flush=True)
    return folder, found


def speed(folder: Path, quick: bool) -> dict[str, Any]:
    """Tokens a second of both ways, by temperature."""
    device = torch.device("cpu")
    language = LanguageModel.load(ModelSettings(model=SMOLLM2, dtype="float32"), device)
    texts = [str(row["prompt"]) for _, row in FilePrompts(path=str(DATA)).rows()][:ROWS]
    contexts = [language.encode(Prompt(str(i), {"prompt": text})) for i, text in enumerate(texts)]
    new, rounds, seeds = 8 if quick else NEW, 1 if quick else ROUNDS, range(ROWS)
    found: dict[str, Any] = {}
    for temperature in TEMPERATURES:
        context = Context(device, agreed=Tokens())
        drawing = Drawing(context, top_k=0 if temperature else 1, batch=1)
        helpers = {
            way: DraftedEngine(model=str(folder), tree=tree).build(language, context) for way, tree in SHAPES.items()
        }
        who: dict[str, LanguageModel | DraftedWriter] = {"alone": language, **helpers}
        ways: dict[str, Callable[[], list[Row]]] = {
            way: partial(each.sample, contexts, 1, new, seeds, drawing) for way, each in who.items()
        }
        written: dict[str, list[float]] = {way: [] for way in ways}
        first = {way: work() for way, work in ways.items()}
        signals = {way: helper.own_signals() for way, helper in helpers.items()}
        for _ in range(rounds):
            for way, work in ways.items():
                begun = time.perf_counter()
                rows = work()
                written[way].append(sum(len(row.actions) for row in rows) / (time.perf_counter() - begun))
        medians = {way: statistics.median(all_) for way, all_ in written.items()}
        found[str(temperature)] = {
            "tokens_a_second": {way: {"median": medians[way], "all": all_} for way, all_ in written.items()},
            "ratio": {way: medians[way] / medians["alone"] for way in helpers},
            "acceptance_length": {way: found["engine/acceptance_length"] for way, found in signals.items()},
            "same_texts": {way: share_alike(first["alone"], first[way]) for way in helpers},
        }
        print(json.dumps(found, indent=2), flush=True)
    return found


def share_alike(rows: list[Row], others: list[Row]) -> float:
    """How many of the texts are the same, token by token."""
    return sum(torch.equal(a.actions, b.actions) for a, b in zip(rows, others, strict=True)) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps and one round, to see that it runs")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": describe_machine("cpu"), "versions": versions()}
    with tempfile.TemporaryDirectory() as place:
        folder, found["acceptance"] = trained(Path(place), options.quick)
        found["speed"] = speed(folder, options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
