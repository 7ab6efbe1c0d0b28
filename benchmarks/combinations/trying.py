"""Two steps of a recipe: whether it runs, is refused at the start, or goes wrong."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
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
from opd.choice import kind_of
from opd.context import Context
from opd.errors import OpdError
from opd.language.model import is_own
from opd.loop import train
from opd.monitor import Monitor
from opd.plan import make_plan
from opd.policies.held_out import HeldOut
from opd.recipe import Recipe, parse_recipe
from opd.run import Run
from opd.teachers import LiveTeacher

STEPS = 2

LOGGING = ("curriculum", "engine", "watch", "truncated_importance")
"""Axes, and a choice, that may do their work and find nothing to change, and say so in the log: samples of the student
as it is have importance 1."""

IN_VAIN = "it is there for held-out measurements alone"
"""Of a line at the start that says so."""

MADE = re.compile(r"/\S*?/(?:causal_lm|image_text|draft|flow_transformer|action_tokens)/")
"""Where the models of a task are."""

FROZEN = ("local", "image_text", "policy")
"""Kinds of teachers that are a model of a folder and depend on no run; one of `flow` reads prompts as its student."""

Verdict = Literal["works", "told", "refused", "alone", "broken"]
"""It runs and each choice shows; it runs as it would without one of the choices, and a line at the start says so; it is
refused at the start; it runs as it would without one of the choices, in silence; a fault."""


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

    def run(self, data: Mapping[str, Any], whole: bool = False) -> Outcome:
        """What comes of a recipe; see `attempted`."""
        name = json.dumps([data, whole], sort_keys=True)
        if name not in self.known:
            self.known[name] = attempted(data, whole)
        return self.known[name]

    def of(self, task: Task, *parts: Part) -> Outcome:
        """What comes of some parts together, each of which must show: in the trained weights, or in what is logged.
        One by itself passes the self-test and `opd check` too."""
        whole = self.run(task.recipe(*parts), whole=True) if len(parts) == 1 else None
        found = whole if whole is not None and whole.verdict != "works" else self.run(task.recipe(*parts))
        for part in parts if found.verdict == "works" else ():
            plain = task.plain(part.axis)
            if part.axis in ("objective", "compatibility") or part == plain:
                # Objectives may descend the same; that one has a gradient was asked already.
                continue
            if any(other.needs.get(part.axis, {}).get("kind") == part.kind for other in parts):
                # It is there with the other in any case.
                continue
            without = self.run(task.recipe(*parts, instead=plain))
            logs = part.axis in LOGGING or part.kind in LOGGING
            seen = found.logged - without.logged if logs else frozenset[str]()
            if without.verdict == "works" and without.weights == found.weights and not seen:
                said = next((note for note in found.notes if IN_VAIN in note), None)
                silent = f"{part.axis} {part.name} changes nothing"
                return Outcome("alone", silent) if said is None else Outcome("told", said.removeprefix("opd: "))
        return found


def attempted(data: Mapping[str, Any], whole: bool = False) -> Outcome:
    """Assemble and train a recipe in a folder of its own, and look at what it did; as a `whole` with its self-test, and
    what `opd check` says of it."""
    said = io.StringIO()
    run: Run | None = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        try:
            recipe = parse_recipe({**data, "output": folder, "self_test": whole})
            planned = _planned(recipe) if whole else ""
            check_ahead(recipe)
            loaded = load_data(recipe)
            not_held_out(recipe, *loaded)
            monitor = (Monitor if whole else Unmeasured)(Path(folder), quiet=True)
            run = assemble(recipe, monitor, data=loaded, teachers=None if whole else _shared(recipe))
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


class Unmeasured(Monitor):
    """Measures nothing on held-out prompts, which takes as long as the steps and does not depend on pairs."""

    def _evaluate(self, run: Run) -> HeldOut:
        return HeldOut({}, [], {})


SHARED: dict[str, LiveTeacher] = {}
"""Frozen models, loaded once for all recipes, by their settings."""


def _shared(recipe: Recipe) -> list[LiveTeacher] | None:
    """The teachers of a recipe, where all are models of folders; None where they have to be built for each run."""
    if not recipe.teacher or any(kind_of(teacher) not in FROZEN for teacher in recipe.teacher):
        return None
    if any(is_own(getattr(teacher, "tokenizer", None)) for teacher in recipe.teacher):
        # These read with the student's tokenizer as well.
        return None
    names = [teacher.model_dump_json() for teacher in recipe.teacher]
    for name, teacher in zip(names, recipe.teacher, strict=True):
        if name not in SHARED:
            SHARED[name] = teacher.build(Context(torch.device("cpu")), None)  # type: ignore[arg-type]  # not looked at
    return [SHARED[name] for name in names]


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
    return " ".join(MADE.sub("", text.replace(folder, "RUN")).removeprefix("recipe: ").split())


def _last_call(text: str) -> str:
    """The error of a traceback, and where it was raised."""
    lines = [line.strip() for line in text.strip().splitlines()]
    places = [line for line in lines if line.startswith('File "')]
    return f"{lines[-1]} ({places[-1]})" if places else lines[-1]
