"""Runs that tests kill and let go on, in this process or in one of their own, and what is compared of two runs."""

from __future__ import annotations

import json
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd.api import execute
from opd.checkpoints.store import folder_of, steps_stored
from opd.monitor import Monitor
from opd.recipe import parse_recipe
from tests.conftest import save_tiny
from tests.processes import Program
from tests.test_loop import TEXTS, recipe_for

HINTED = {"prompts": [{"kind": "inline", "prompts": [{"prompt": t, "hint": f"{t} think"} for t in TEXTS]}]}
EMA = {"teacher": {"kind": "self", "mode": "ema", "rate": 0.1, "sees": "hint"}, **HINTED}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


@pytest.fixture
def models(tmp_path):
    return save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)


@pytest.fixture
def make(models, tmp_path):
    """A recipe of six small steps, a checkpoint every two, in the directory `name`; `whole` blocks replace others."""

    def of(name, whole=None, **changes):
        small = {
            "steps": 6,
            "batch": {"prompts": 4, "group": 1, "micro": 4},
            "rollout": {"max_new_tokens": 6},
            "evaluation": {"held_out": 2, "samples": 1, "every": 3},
            "checkpoint": {"every": 2},
        }
        for key, value in changes.items():
            known = small.get(key)
            small[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        recipe = recipe_for(models, tmp_path, output=str(tmp_path / name), **small)
        return parse_recipe({**recipe.dump(), **(whole or {})})

    return of


def killed_at(monkeypatch, recipe, step, **options):
    """Run until `step` is logged and half of what follows it, then die."""
    after_step = Monitor.after_step

    def dying(self, run, signals, measurement):
        measured = after_step(self, run, signals, measurement)
        if run.step == step:
            raise Killed
        return measured

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "after_step", dying)
        with pytest.raises(Killed):
            execute(recipe, quiet=True, **options)


def final(recipe):
    """The last checkpoint's tensors: weights, moments, teachers, generators."""
    directory = recipe.directory
    return load_file(folder_of(directory, steps_stored(directory)[0]) / "tensors.safetensors")


def records(recipe, name="metrics.jsonl"):
    """The lines of a log without what a clock says."""
    rows = [json.loads(line) for line in (recipe.directory / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "per_second" not in k} for row in rows]


def assert_same_run(one, other):
    for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"):
        assert records(one, name) == records(other, name)
    mine, theirs = final(one), final(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)), name
    students = [load_file(recipe.directory / "student" / "model.safetensors") for recipe in (one, other)]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


def start(recipe, tmp_path, *words, limit=None):
    """The command line on a recipe, in a process of its own."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()))
    return Program(tmp_path, "train", str(path), "--quiet", *words, limit=limit)


def until(condition, seconds=150):
    deadline = time.time() + seconds
    while time.time() < deadline and not condition():
        time.sleep(0.02)
    assert condition()


def logged(recipe):
    path = recipe.directory / "metrics.jsonl"
    return path.read_text().count("train/loss") if path.exists() else 0
