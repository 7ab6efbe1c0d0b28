"""What Python can hand in besides a recipe: a function that judges, callbacks, live trackers."""

from __future__ import annotations

import json
import sys

import pytest
from accelerate.tracking import GeneralTracker
from typer.testing import CliRunner

import opd
import opd.monitor
from opd.cli.main import app, main
from opd.errors import DataError, OpdError, RecipeError, RunError
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


class Boom(opd.Callback):
    """Fails in one method at one step, or whenever that is called."""

    def __init__(self, event, step=None):
        def fail(*told):
            if step in (None, told[0]):
                raise ValueError("boom")

        setattr(self, event, fail)


def ended(path, models, **changes):
    """The lines of the error that a run ends by."""
    with pytest.raises(OpdError) as error:
        short_run(path, *models, **{"steps": 5, "checkpoint": {"every": 3}, **changes})
    return str(error.value).splitlines()


def test_no_step_is_lost_to_a_callback_that_fails(models, tmp_path):
    undisturbed = short_run(tmp_path / "other", *models, steps=5, checkpoint={"every": 3})
    what = "the callback Boom.on_log failed (ValueError: boom)"
    kept = tmp_path / "run" / "checkpoints" / "step-00000002"
    told = ended(tmp_path / "run", models, callbacks=[Boom("on_log", 2)])
    assert told == [what, f"Step 2 is kept in {kept}; to go on from there: the same call with resume=True"]
    whole = short_run(tmp_path / "run", *models, steps=5, checkpoint={"every": 3}, resume=True, callbacks=[Notes()])
    losses = [[r["train/loss"] for r in run.history if "train/loss" in r] for run in (undisturbed, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5
    assert whole.after == undisturbed.after
    # Before the first step and behind the last one.
    nothing = "There is no checkpoint yet (checkpoint.every=3), and no step was taken; to begin again: overwrite=True"
    for event in ("on_start", "on_log", "on_samples"):
        assert ended(tmp_path / event, models, callbacks=[Boom(event)])[1] == nothing
    told = ended(tmp_path / "none", models, callbacks=[Boom("on_log", 2)], checkpoint={"every": 0})
    assert told[1].startswith("There is no checkpoint yet (checkpoint.every=0), and none of its 2 steps is kept; to")
    whole = f"The run itself is whole: its student and summary.json are in {tmp_path / 'end'}"
    assert ended(tmp_path / "end", models, callbacks=[Boom("on_end")])[1] == whole


def test_an_error_within_a_step_says_what_is_kept_and_how_to_go_on(models, tmp_path, monkeypatch):
    calls = []

    def breaks(row, completion):
        # Two held-out prompts, and four of each step.
        calls.append(row)
        return 1 / len(calls) if len(calls) <= 2 + 4 * 4 + 1 else row["missing"]

    told = ended(tmp_path / "run", models, verifier=breaks)
    assert "failed (KeyError: 'missing')" in told[0]
    kept = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert told[1:] == [
        f"Step 3 is kept in {kept}, the one after it is not; to go on from there: the same call with resume=True"
    ]

    def lost(self, *args):
        raise DataError("a row is gone")

    # What a recipe says whole goes on by a command, and so does an error of another library's.
    with monkeypatch.context() as patch:
        patch.setattr("opd.curricula.shuffled.ShuffledCourse.next", lost)
        told = ended(tmp_path / "command", models)
        assert told == ["a row is gone", "There is no checkpoint yet (checkpoint.every=3), and no step was taken; "
                        "to begin again: --overwrite (Python: overwrite=True)"]  # fmt: skip
    after_step = opd.monitor.Monitor.after_step

    def fails(self, run, *args):
        if run.step == 5:
            raise ZeroDivisionError("theirs")
        return after_step(self, run, *args)

    monkeypatch.setattr("opd.monitor.Monitor.after_step", fails)
    with pytest.raises(ZeroDivisionError) as error:
        short_run(tmp_path / "command", *models, steps=5, checkpoint={"every": 3}, overwrite=True)
    run = tmp_path / "command"
    assert error.value.__notes__ == [
        f"Step 3 is kept in {run / 'checkpoints' / 'step-00000003'}, the 2 after it are not; to go on from there: "
        f"opd train {run / 'recipe.yaml'} --resume"
    ]


def test_a_resume_that_finds_no_checkpoint_says_that_it_begins(models, tmp_path, capsys):
    ended(tmp_path / "run", models, callbacks=[Boom("on_start")])
    said = f"opd: there is no checkpoint in {tmp_path / 'run'} to go on from: the run begins from the start"
    for resume in (True, "auto"):
        ended(tmp_path / "run", models, callbacks=[Boom("on_start")], resume=resume)
        assert said in capsys.readouterr().err.splitlines()
    for name, resume in (("empty", True), ("new", "auto")):
        if resume is True:
            (tmp_path / name).mkdir()
        ended(tmp_path / name, models, callbacks=[Boom("on_start")], resume=resume)
        assert ("there is no checkpoint" in capsys.readouterr().err) == (resume is True)
    ended(tmp_path / "run", models, callbacks=[Boom("on_start")], overwrite=True)
    assert "there is no checkpoint" not in capsys.readouterr().err


def test_names_of_the_package_are_listed_and_it_says_its_version(monkeypatch, capsys):
    assert {"distill", "Callback", "load_recipe", "__version__"} <= set(dir(opd))
    monkeypatch.setattr(sys, "argv", ["opd", "--version"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code in (0, None)
    assert capsys.readouterr().out == f"opd {opd.__version__}\n"
