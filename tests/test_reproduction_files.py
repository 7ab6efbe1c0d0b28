"""The reproductions that come with opd: their recipes are valid, and the smoke run of each goes through."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.reproductions import runner, train
from opd.reproductions.catalogue import shipped
from opd.reproductions.definition import merged
from opd.reproductions.fork_server import MODULES, fork_server
from opd.reproductions.reproduce import reproduce
from reproductions import flow_opd
from reproductions.drawn import by_number, drawings, gradients, in_bundles, wins
from reproductions.on_policy import at_rate

ROOT = Path(__file__).parent.parent
NAMES = sorted(shipped())


def blocks(value):
    """Every recipe in a stage's params."""
    if isinstance(value, dict):
        found = [value["recipe"]] if isinstance(value.get("recipe"), dict) else []
        return found + [b for item in value.values() for b in blocks(item)]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_of_a_reproduction_is_valid(name):
    reproduction = shipped()[name].reproduction
    for one in (reproduction, reproduction.smoked()):
        stages = [*one.stages.values(), *one.arms.values()]
        found = [block for stage in stages for block in blocks(dict(stage.params))]
        assert found
        for block in found:
            # A debate's wording has places of its own.
            place = r"\{(?!expert|round|tag|number)[\w ,.]+\}"
            text = re.sub(place, "folder", yaml.safe_dump(block, sort_keys=False, default_flow_style=False))
            parse_recipe({**yaml.safe_load(text), "seed": 0})


def test_a_win_is_one_against_every_expert():
    own = {"a": 32, "b": 32, "c": 16, "d": 32}
    experts = {"one": {"a": 0, "b": 32, "c": 16, "d": 20}, "other": {"a": 4, "b": 0, "c": 0, "d": 0}}
    assert wins(own, experts, 32) == 2.0
    assert wins(experts["one"], experts, 32) == 0.0


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """What starts the jobs of all reproductions here: one process that has imported what they need, where each command
    has one of its own."""
    folder = tmp_path_factory.mktemp("warm")
    modules = dict.fromkeys(module for entry in shipped().values() for module in entry.reproduction.imports)
    with pytest.MonkeyPatch.context() as patch, (folder / "lock").open("w") as lock:
        patch.setenv("PYTHONPATH", str(ROOT))
        with fork_server(folder / "log", lock.fileno(), (*MODULES, *modules)) as server:
            yield server


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_run_of_a_reproduction_goes_through(name, warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "fork_server", lambda *_: contextlib.nullcontext(warm))
    said = io.StringIO()
    done = reproduce(shipped()[name], smoke=True, workers=2, console=Console(file=said))
    assert done.results is not None, [*done.problems, said.getvalue()[-2000:]]
    assert (tmp_path / "runs" / "reproductions" / name / "smoke-results.json").is_file()


@pytest.fixture(scope="module")
def specialists(tmp_path_factory):
    """A base that has seen count and glyph for a few batches, and a specialist each: flow matching on clean drawings of
    the one task, where the reproduction's experts (and the paper's) are reinforced."""
    folder, inputs = tmp_path_factory.mktemp("specialists"), {}

    def place(name):
        inputs[name] = folder / name
        inputs[name].mkdir()
        return inputs[name]

    few = {"evaluation": {"prompts": [drawings("count", 2, "validation")], "steps": 2, "every": 0}}
    sets = {task: drawings(task, 400) for task in ("count", "glyph")}
    flow_opd.new_model(place("new"), {}, width=32, heads=2, layers=2, seed=0)
    start = {"student": {"train_prompts": True}, "prompts": list(sets.values()), **few}
    train(place("base"), inputs, recipe=flow_opd.matching(flow_opd.of("new"), 120, 2e-3, **start), seed=0)
    for task, of_task in sets.items():
        block = flow_opd.matching(flow_opd.of("base"), 60, 2e-3, prompts=[of_task], **few)
        train(place(f"expert {task}"), inputs, recipe=block, seed=1)
    return inputs


@pytest.mark.parametrize(("estimator", "nearer"), [("kl_direct", True), ("pg_detached", False)])
def test_losses_of_flow_opd_point_where_they_say(estimator, nearer, specialists, tmp_path):
    """A few steps bring the student nearer to the routed specialists on its own latents, or leave it to noise."""
    block = flow_opd.distilled("base", estimator=estimator)
    block["teacher"][0]["routes"] = {
        task: {"kind": "flow", "model": flow_opd.of(f"expert {task}")} for task in ("count", "glyph")
    }
    own = {
        "steps": 15,
        "update": {"learning_rate": {"warmup": 5}},
        "prompts": [drawings(task, 200) for task in ("count", "glyph")],
        "rollout": {"steps": 6},
        "batch": {"prompts": 4, "group": 4},
        "evaluation": {
            "prompts": [drawings(task, 12, "validation") for task in ("count", "glyph")],
            "steps": 2,
            "every": 0,
        },
    }
    figures = train(tmp_path, specialists, recipe=at_rate(merged(block, own), 1e-3), seed=0)
    before, after = (figures["curve"][i]["reverse_kl"] for i in (0, -1))
    assert after < 0.8 * before if nearer else after > 0.97 * before


@pytest.mark.parametrize(("estimator", "low", "high"), [("kl_direct", 0.5, 2.0), ("pg_detached", -0.05, 0.05)])
def test_gradients_go_along_that_of_the_divergence_or_nowhere(estimator, low, high, specialists, tmp_path):
    block = flow_opd.distilled("base", estimator=estimator)
    block["teacher"][0]["routes"] = {
        task: {"kind": "flow", "model": flow_opd.of(f"expert {task}")} for task in ("count", "glyph")
    }
    few = {"prompts": [drawings(task, 50) for task in ("count", "glyph")], "batch": {"prompts": 4, "group": 2}}
    few["evaluation"] = {"prompts": [drawings("count", 2)]}
    figures = gradients(tmp_path, specialists, recipe=merged(block, few), batches=3, seed=0)
    assert low < figures["along"] < high


def test_a_model_that_always_draws_four_cannot_count():
    rows = [("count", 1), ("count", 4), ("count", 4), ("count", 1), ("glyph", None)]
    prompts = [Prompt("p", {"prompt": "x", "task": task} | ({"number": n} if n else {})) for task, n in rows]
    assert by_number(prompts, np.array([0.0, 1.0, 1.0, 0.0, 1.0])) == {"count_1": 0.0, "count_4": 1.0}


def test_equal_texts_share_a_bundle():
    texts = [["a", "b", "a", "c"], ["x", "y", "x", "y"]]
    scores = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    # Two texts are the fewest: the first set's third text goes round to its first bundle.
    assert in_bundles(scores, texts).tolist() == [[2 / 3, 0.0], [0.5, 0.0]]
