"""What Python can hand in besides a recipe: a function that judges, callbacks, live trackers."""

from __future__ import annotations

import json
import sys

import pytest
from accelerate.tracking import GeneralTracker
from typer.testing import CliRunner

import opd
from opd.cli.main import app, main
from opd.errors import DataError, RecipeError, RunError
from opd.prompts import Prompt
from opd.recipe import load_recipe, parse_recipe
from tests.conftest import tiny_model
from tests.tiny import saved, short_run, turn_tokenizer

BLOCKS = {"student": "org/small", "teacher": "org/large", "prompts": ["p.jsonl"]}


@pytest.fixture
def models(tmp_path):
    tokenizer = turn_tokenizer()
    return [
        {
            "model": saved(tmp_path / name, tiny_model(vocabulary=len(tokenizer), seed=seed), tokenizer),
            "template": "plain",
        }
        for seed, name in enumerate("st")
    ]


def shortness(row, completion):
    return 1 / (1 + len(completion)) if "?" not in row["prompt"] else None


def test_a_function_judges_completions():
    verifier = parse_recipe(BLOCKS | {"verifier": shortness}).verifier
    assert verifier.score(Prompt("a", {"prompt": "x"}), "abc") == 0.25
    assert verifier.score(Prompt("a", {"prompt": "x?"}), "abc") is None
    routed = {"kind": "routed", "by": "task", "routes": {"short": shortness}}
    assert parse_recipe(BLOCKS | {"verifier": routed}).verifier.routes["short"].call is shortness
    assert parse_recipe(BLOCKS | {"verifier": lambda row, text: text == "a"}).verifier.score(Prompt("a", {}), "a") == 1


def test_a_function_that_fails_or_says_no_number_is_named_with_the_row():
    prompt = Prompt("a", {"prompt": "x"}, where="p.jsonl:3")

    def broken(row, completion):
        return row["missing"]

    with pytest.raises(DataError, match=r"p.jsonl:3: the verifier .*broken failed \(KeyError: 'missing'\)"):
        parse_recipe(BLOCKS | {"verifier": broken}).verifier.score(prompt, "x")
    for wrong in (2, -0.1, "yes", float("nan")):
        with pytest.raises(DataError, match=r"p.jsonl:3: .* returned .*; it must be a number from 0 to 1"):
            parse_recipe(BLOCKS | {"verifier": lambda row, text, wrong=wrong: wrong}).verifier.score(prompt, "x")


def test_a_recipe_on_a_disk_names_no_function(models, tmp_path):
    routed = {"kind": "routed", "by": "task", "routes": {"short": shortness}}
    prompts = {"kind": "inline", "prompts": [{"prompt": f"add {i}+2", "task": "short"} for i in range(8)]}
    result = short_run(tmp_path / "run", *models, prompts, verifier=routed, checkpoint={"every": 2})
    assert 0 < result.after["accuracy"] < 1
    with pytest.raises(RecipeError, match=r"call is .*shortness passed from Python.*a function is pass"):
        load_recipe(str(result.directory / "recipe.yaml"))
    json.loads(opd.recipe.json_schema())
    read = load_recipe(str(result.directory / "recipe.yaml"), recorded=True)
    assert "shortness passed from Python" in read.dump()["verifier"]["routes"]["short"]["call"]
    with pytest.raises(DataError, match="a recipe on a disk has its name alone"):
        read.verifier.routes["short"].score(Prompt("a", {"prompt": "x"}), "x")
    assert CliRunner().invoke(app, ["export", str(result.directory), str(tmp_path / "out")]).exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        result.directory / "student" / "model.safetensors"
    ).read_bytes()


class Notes(opd.Callback):
    def __init__(self, last=None):
        self.heard, self.last = [], last

    def on_start(self, recipe):
        self.heard.append(("start", recipe.steps))

    def on_log(self, step, values):
        self.heard.append(("log", step, "train/loss" in values))
        return step == self.last

    def on_samples(self, step, rows):
        self.heard.append(("samples", step, len(rows)))

    def on_end(self, directory, summary):
        self.heard.append(("end", (directory / "student").is_dir(), summary["steps"]))


class Kept(GeneralTracker):
    name = "kept"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged, self.finished = [], False

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.configuration = values

    def log(self, values, step, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_callbacks_and_live_trackers_hear_what_is_logged(models, tmp_path):
    notes, kept = Notes(), Kept()
    short_run(tmp_path / "run", *models, callbacks=[notes, kept])
    assert notes.heard == [
        ("start", 2),
        ("log", 0, False),
        ("samples", 0, 2),
        ("log", 1, True),
        ("log", 2, True),
        ("log", 2, False),
        ("samples", 2, 2),
        ("end", True, 2),
    ]
    assert [step for step, _ in kept.logged] == [0, 1, 2, 2]
    assert kept.configuration["steps"] == 2
    assert kept.finished


def test_a_callback_may_end_the_run_which_is_saved(models, tmp_path):
    result = short_run(tmp_path / "run", *models, steps=5, callbacks=[Notes(last=1)])
    assert (result.summary["steps"], result.summary["stopped_early"]) == (1, True)
    assert result.summary["ended_by"] == "the callback Notes.on_log asked for it after step 1"
    assert result.stopped_by is None
    assert (result.directory / "student" / "model.safetensors").is_file()


def test_a_callback_that_fails_is_named():
    class Failing(opd.Callback):
        def on_start(self, recipe):
            raise ValueError("no")

    with pytest.raises(RunError, match=r"the callback Failing.on_start failed \(ValueError: no\)"):
        opd.callbacks.Callbacks([Failing()]).tell("on_start", None)
    for wrong in (Failing, print):
        with pytest.raises(RecipeError, match=r"callbacks\[0\] is .*; give objects of opd.Callback"):
            opd.callbacks.Callbacks([wrong])
    with pytest.raises(RecipeError, match=r"callbacks is .*Notes object.*; give a list of objects of opd.Callback"):
        opd.callbacks.Callbacks(Notes())
    assert len(opd.callbacks.Callbacks(iter([Notes(), Kept()])).trackers) == 1


def test_names_of_the_package_are_listed_and_it_says_its_version(monkeypatch, capsys):
    assert {"distill", "Callback", "load_recipe", "__version__"} <= set(dir(opd))
    monkeypatch.setattr(sys, "argv", ["opd", "--version"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code in (0, None)
    assert capsys.readouterr().out == f"opd {opd.__version__}\n"
