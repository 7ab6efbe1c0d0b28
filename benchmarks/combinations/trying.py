"""Two steps of a recipe: whether it runs, is refused at the start, or goes wrong."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel

from benchmarks.combinations.parts import Part, Task
from opd.assembly import assemble, check_ahead, load_data, not_held_out
from opd.errors import OpdError
from opd.loop import train
from opd.monitor import Monitor
from opd.plan import make_plan
from opd.recipe import Recipe, parse_recipe
from opd.run import Run

STEPS = 2

LOGGING = ("curriculum", "engine", "watch")
"""Axes whose choices may do their work and find nothing to change, and say so in the log."""

Verdict = Literal["works", "alone", "refused", "broken"]
"""It runs and each choice shows; it runs as it would without one of the choices; the message of the start; a fault."""


@dataclass(frozen=True)
class Outcome:
    """What came of a recipe.

    Attributes:
        verdict: see `Verdict`.
        reason: the message of a refusal, or what is wrong.
        notes: lines that a person was warned by.
        weights: hash of what was trained.
        logged: names that the steps logged.
    """

    verdict: Verdict
    reason: str = ""
    notes: tuple[str, ...] = ()
    weights: str = ""
    logged: frozenset[str] = frozenset()


class Trials:
    """Recipes of tiny tasks, each tried once: many pairs need the same one to be compared with."""

    def __init__(self) -> None:
        self.known: dict[str, Outcome] = {}

    def run(self, data: Mapping[str, Any]) -> Outcome:
        """What comes of a recipe alone."""
        name = json.dumps(data, sort_keys=True)
        if name not in self.known:
            self.known[name] = attempted(data)
        return self.known[name]

    def pair(self, task: Task, *parts: Part) -> Outcome:
        """What comes of some parts together, each of which must show: in the trained weights, or in what is logged."""
        found = self.run(task.recipe(*parts))
        for part in parts if found.verdict == "works" else ():
            plain = task.plain(part.axis)
            if part.axis in ("objective", "compatibility") or part == plain:
                # Objectives may descend the same; that one has a gradient was asked already.
                continue
            without = self.run(task.recipe(*parts, instead=plain))
            seen = found.logged - without.logged if part.axis in LOGGING else frozenset[str]()
            if without.verdict == "works" and without.weights == found.weights and not seen:
                return Outcome("alone", f"{part.axis} {part.name} changes nothing", found.notes)
        return found


def attempted(data: Mapping[str, Any]) -> Outcome:
    """Assemble and train a recipe in a folder of its own, and look at what it did."""
    said = io.StringIO()
    run: Run | None = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        try:
            recipe = parse_recipe({**data, "output": folder})
            planned = _planned(recipe)
            check_ahead(recipe)
            loaded = load_data(recipe)
            not_held_out(recipe, *loaded)
            run = assemble(recipe, Monitor(Path(folder), quiet=True), data=loaded)
        except OpdError as error:
            return Outcome("refused", _shortened(str(error), folder))
        except Exception:
            return Outcome("broken", f"at the start: {_last_call(traceback.format_exc())}")
        try:
            before = _hash(run)
            train(run)
            problem = _problem(run, before) or planned
        except Exception:
            return Outcome("broken", f"while it trained: {_last_call(traceback.format_exc())}")
        finally:
            run.close()
        logged = frozenset(name for record in run.monitor.history for name in record)
        notes = tuple(line for line in said.getvalue().splitlines() if line.startswith("opd: "))
        verdict: Verdict = "broken" if problem else "works"
        return Outcome(verdict, problem, notes, _hash(run), logged)


def _planned(recipe: Recipe) -> str:
    """What `opd check` has against a recipe; what is refused there must be refused by a run too."""
    try:
        make_plan(recipe)
    except OpdError as error:
        return f"opd check refuses it: {error}"
    return ""


def _hash(run: Run) -> str:
    """Of the weights that are trained."""
    found = hashlib.blake2b(digest_size=8)
    module = extract_model_from_parallel(run.student.module)
    for _, weight in sorted(module.named_parameters()):
        if weight.requires_grad:
            found.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _problem(run: Run, before: str) -> str:
    """What is wrong with a run that came to its end; empty where nothing is."""
    steps = [record for record in run.monitor.history if "train/loss" in record]
    if len(steps) != STEPS or run.step != STEPS:
        return f"{run.step} steps were taken"
    strange = sorted({name for record in run.monitor.history for name, v in record.items() if not math.isfinite(v)})
    if strange:
        return f"not a number: {', '.join(strange)}"
    for name in ("empty", "skipped", "invalid"):
        if any(record.get(f"train/{name}") for record in steps):
            return f"a step was {name}"
    if any(record.get("train/gradient_norm", 1.0) == 0 for record in steps):
        return "a gradient was 0"
    weights = extract_model_from_parallel(run.student.module).state_dict().values()
    if not all(bool(torch.isfinite(weight.float()).all()) for weight in weights):
        return "weights that are no numbers"
    return "no weight moved" if _hash(run) == before else ""


def _shortened(text: str, folder: str) -> str:
    """A message without the places of this trial."""
    return " ".join(text.replace(folder, "RUN").removeprefix("recipe: ").split())


def _last_call(text: str) -> str:
    """The error of a traceback, and where it was raised."""
    lines = [line.strip() for line in text.strip().splitlines()]
    places = [line for line in lines if line.startswith('File "')]
    return f"{lines[-1]} ({places[-1]})" if places else lines[-1]
