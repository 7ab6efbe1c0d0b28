"""`opd check` looks at the run's directory: what a start would refuse there, and how it would go on."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from opd.api import execute
from opd.checkpoints.store import folder_of
from opd.cli.main import app
from opd.errors import RecipeError, RunError
from opd.files.whole import locked
from opd.plan.place import found_at, lacking
from tests.checkpoints import killed_at, make, models  # noqa: F401


def same_refusal(recipe, message):
    """Of the plan and of a start."""
    with pytest.raises((RunError, RecipeError)) as planned:
        found_at(recipe)
    with pytest.raises((RunError, RecipeError)) as started:
        execute(recipe, quiet=True)
    assert str(planned.value) == str(started.value)
    assert message in str(planned.value)


def test_a_place_that_is_free_is_left_as_it_is(make, tmp_path):  # noqa: F811
    assert found_at(make("a/b")) == []
    assert not (tmp_path / "a").exists()


def test_a_place_that_cannot_be_written_is_refused(make, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "file").write_text("")
    same_refusal(make("file/run"), "can be no directory here (Not a directory)")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        RunError, match=r"cannot write to the run directory .*run \(Permission denied\); set output=PATH"
    ):
        found_at(make("run"))


def test_a_place_of_others_is_refused(make, tmp_path):  # noqa: F811
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text("")
    same_refusal(make("used"), "a run would write over")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ".lock").write_text("of a package manager")
    same_refusal(make("foreign"), "was not written by opd")
    (tmp_path / "held").mkdir()
    with locked(tmp_path / "held"):
        same_refusal(make("held"), f"is being written by process {os.getpid()} on")
    assert found_at(make("held")) == []


def test_a_run_that_is_there_is_told_with_how_it_goes_on(make, monkeypatch):  # noqa: F811
    recipe = make("run")
    killed_at(monkeypatch, recipe, 5)
    before = sorted((path, path.stat().st_mtime_ns) for path in recipe.directory.rglob("*"))
    (note,) = found_at(recipe)
    assert note.startswith(
        f"{recipe.directory} holds a run already: --resume (Python: resume=True) goes on from step 4 of"
    )
    assert note.endswith("--overwrite (Python: overwrite=True) begins anew, and without either a start is refused")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in recipe.directory.rglob("*"))

    (note,) = found_at(make("run", whole={"resume": "auto"}))
    assert note == f"{recipe.directory} holds a run already: resume: auto goes on from step 4 of 6"
    (note,) = found_at(make("run", update={"learning_rate": 1e-4}))
    assert "is refused: this is not the run of" in note
    assert "update.learning_rate" in note
    same_refusal(make("run", whole={"resume": "auto"}, update={"learning_rate": 1e-4}), "this is not the run of")

    next(folder_of(recipe.directory, 4).glob("*.safetensors")).write_bytes(b"")
    (note,) = found_at(recipe)
    assert "goes on from step 2 of 6 (" in note, "the damaged one is passed over, and said to be"
    shutil.rmtree(recipe.directory / "checkpoints")
    (note,) = found_at(recipe)
    assert "begins it again, since it was stopped before its first checkpoint" in note


def test_what_this_machine_lacks_is_said_and_the_plan_made(make, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("opd.trackers.tracking.get_available_trackers", list)
    monkeypatch.setattr("opd.hub.constants.HF_HUB_OFFLINE", True)
    recipe = make("run", tracking={"trackers": ["tensorboard"]}, push_to="org/student")
    tracker, push = lacking(recipe)
    assert tracker.startswith("a run here is refused: tracking.trackers names tensorboard, which is not installed")
    assert push == "a run here is refused: push_to is 'org/student' and HF_HUB_OFFLINE is set: unset one of them"
    file = tmp_path / "mine.json"
    file.write_text(recipe.model_dump_json())
    shown = json.loads(CliRunner().invoke(app, ["check", str(file), "--json"]).output)
    assert {tracker, push} <= set(shown["notes"])
