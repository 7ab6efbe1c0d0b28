"""Nothing is removed that opd did not write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import opd
from opd.api import execute, export
from opd.errors import OpdError, RecipeError, RunError
from opd.files.whole import locked, whole_folder
from opd.language.creation import create_model, task_tokenizer
from opd.recipe import parse_recipe
from opd.teachers.memory import Memory, MemorySettings
from tests.conftest import save_tiny


def tree(folder):
    """Every file below a folder with its bytes, locks left out."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture
def models(tmp_path):
    return save_tiny(tmp_path / "models" / "s", seed=1), save_tiny(tmp_path / "models" / "t", seed=2)


@pytest.fixture
def recipe(models, tmp_path):
    def make(output=None, **changes):
        student, teacher = models
        return parse_recipe(
            {
                "student": {"model": student, "template": "plain"},
                "teacher": {"model": teacher, "template": "plain"},
                "prompts": {"kind": "inline", "prompts": ["ab", "cd", "ef", "gh"]},
                "steps": 1,
                "batch": {"prompts": 2},
                "rollout": {"max_new_tokens": 4},
                "evaluation": {"held_out": 1, "samples": 1},
                "checkpoint": {"every": 1},
                "tracking": {"trackers": []},
                "hardware": {"device": "cpu", "threads": 1},
                "self_test": False,
                **({} if output is None else {"output": str(output)}),
                **changes,
            }
        )

    return make


@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_that_is_no_folder_of_its_own_is_refused(recipe, name):
    with pytest.raises(RecipeError, match=r"name is .*runs/NAME"):
        recipe(name=name)


def test_the_working_directory_home_and_what_holds_them_are_no_run_directories(recipe, tmp_path, monkeypatch):
    place, home = tmp_path / "here" / "work", tmp_path / "home" / "me"
    for folder in (place, home):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "mine.txt").write_text("mine")
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(home))
    before = tree(tmp_path)
    for output in (".", "..", "../work", str(place), str(place.parent), "/", str(home), str(home.parent)):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(RecipeError, match=r"output is .*cannot be a run's directory"):
                execute(recipe(output), quiet=True, **options)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoints/mine.txt", "student/config.json", "metrics.jsonl", "recipe.yaml"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_folder_that_is_no_run_is_neither_cleared_nor_written_over(recipe, tmp_path, name, options):
    place = tmp_path / "data"
    for other in (name, "opd/code.py"):
        (place / other).parent.mkdir(parents=True, exist_ok=True)
        (place / other).write_text("mine: 1")
    before = tree(place)
    with pytest.raises(RunError, match=r"holds no run of opd.*output=PATH"):
        execute(recipe(place), quiet=True, **options)
    assert tree(place) == before


def test_a_folder_with_other_things_takes_a_run_and_keeps_them(recipe, tmp_path):
    place = tmp_path / "data"
    (place / "opd").mkdir(parents=True)
    (place / "opd" / "code.py").write_text("mine")
    (place / "notes.txt").write_text("mine")
    execute(recipe(place), quiet=True)
    execute(recipe(place, seed=3), quiet=True, overwrite=True)
    assert (place / "notes.txt").read_text() == (place / "opd" / "code.py").read_text() == "mine"
    assert (place / "student" / "config.json").is_file()


@pytest.mark.parametrize(
    "name",
    ["student/notes.txt", "student/more/notes.txt", "checkpoints/notes.txt", "checkpoints/step-00000001/notes"],
)
def test_a_run_that_somebody_has_put_something_into_is_not_replaced(recipe, tmp_path, name):
    place, tracked = tmp_path / "run", {"tracking": {"trackers": ["tensorboard"]}}
    execute(recipe(place, **tracked), quiet=True)
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text("mine")
    before = tree(place)
    with pytest.raises(RunError, match=rf"{name} was not written by opd"):
        execute(recipe(place, **tracked), quiet=True, overwrite=True)
    assert tree(place) == before
    (place / name).unlink()
    if name.startswith("student/more"):
        (place / "student" / "more").rmdir()
    execute(recipe(place, seed=5, **tracked), quiet=True, overwrite=True)
    assert json.loads((place / "environment.json").read_text())["seed"] == 5
    assert not {p.name for p in (place / "opd").rglob("events*")} & {Path(n).name for n in before if "events" in n}


@pytest.mark.parametrize("name", ["student", "checkpoints", "summary.json"])
def test_a_link_out_of_the_run_is_not_followed(recipe, tmp_path, name):
    place, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    execute(recipe(place), quiet=True)
    (place / name).rename(elsewhere)
    (place / name).symlink_to(elsewhere)
    before = tree(tmp_path)
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(RunError, match=r"is a link"):
            execute(recipe(place, steps=2), quiet=True, **options)
    assert tree(tmp_path) == before


def test_a_link_inside_the_student_is_not_followed(recipe, tmp_path):
    place, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    execute(recipe(place), quiet=True)
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (place / "student" / "more").symlink_to(elsewhere)
    with pytest.raises(RunError, match=r"student/more was not written"):
        execute(recipe(place), quiet=True, overwrite=True)
    assert (elsewhere / "mine").read_text() == "mine"


def test_what_was_put_into_the_student_of_a_run_that_goes_on_is_kept(recipe, tmp_path):
    place = tmp_path / "run"
    execute(recipe(place), quiet=True)
    (place / "student" / "notes.txt").write_text("mine")
    first = (place / "student" / "model.safetensors").read_bytes()
    execute(recipe(place, steps=2), quiet=True, resume=True)
    kept = place / "student.kept-1"
    assert (kept / "notes.txt").read_text() == "mine"
    assert (kept / "model.safetensors").read_bytes() == first != (place / "student" / "model.safetensors").read_bytes()


def test_checkpoints_that_are_kept_for_somebody_stay(recipe, tmp_path):
    place = tmp_path / "run"
    once = {"checkpoint": {"every": 1, "keep_last": 1}}
    execute(recipe(place, **once), quiet=True)
    (place / "checkpoints" / "step-00000001" / "notes").write_text("mine")
    (place / "checkpoints" / ".step-notes").mkdir()
    execute(recipe(place, steps=3, **once), quiet=True, resume=True)
    assert sorted(os.listdir(place / "checkpoints")) == [".step-notes", "step-00000001", "step-00000003"]


def test_a_lock_of_another_program_is_not_written_over(tmp_path):
    (tmp_path / ".lock").write_text("of a package manager")
    with pytest.raises(RunError, match=r"was not written by opd"), locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "of a package manager"


def test_a_folder_beside_the_target_by_the_name_of_a_leftover_is_kept(tmp_path):
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
        with pytest.raises(RunError, match=r"was not written by opd"), whole_folder(tmp_path / "out"):
            pass
        assert (tmp_path / name / "mine").read_text() == "mine"
        (tmp_path / name / "mine").unlink()
        (tmp_path / name).rmdir()


def test_the_only_copy_is_back_in_place_when_the_exchange_fails(tmp_path, monkeypatch):
    target, rename = tmp_path / "out", Path.rename

    def fails(self, other):
        if self.name == ".out.partial":
            raise OSError(5, "no")
        return rename(self, other)

    with whole_folder(target, ["file"]) as folder:
        (folder / "file").write_text("one")
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match=r"no"), whole_folder(target, ["file"]) as folder:
        (folder / "file").write_text("two")
    assert (target / "file").read_text() == "one"


def test_export_and_merge_replace_only_what_opd_wrote(recipe, models, tmp_path, monkeypatch):
    place, out = tmp_path / "run", tmp_path / "out"
    execute(recipe(place), quiet=True)
    for write in (
        lambda **options: export(place, out, **options),
        lambda **options: opd.merge(list(models), out, **options),
    ):
        write()
        before = tree(out)
        with pytest.raises(RunError, match=r"not empty.*--overwrite"):
            write()
        write(overwrite=True)
        (out / "mine").write_text("mine")
        with pytest.raises(RunError, match=r"out/mine was not written by opd"):
            write(overwrite=True)
        (out / "mine").unlink()
        assert tree(out).keys() == before.keys()
        (tmp_path / "foreign").mkdir(exist_ok=True)
        for file in list(out.iterdir()):
            file.rename(tmp_path / "foreign" / file.name)
        (tmp_path / "foreign" / "opd.json").unlink()
        (tmp_path / "foreign").rename(tmp_path / "aside")
        out.rmdir()
        (tmp_path / "aside").rename(out)
        with pytest.raises(RunError, match=r"was not written by opd"):
            write(overwrite=True)
        for file in out.iterdir():
            file.unlink()
    monkeypatch.chdir(out)
    with pytest.raises(RunError, match=r"folder of its own"):
        export(place, Path("."), overwrite=True)


def test_a_new_model_replaces_only_one_that_opd_wrote(tmp_path):
    sizes = {"width": 16, "layers": 1, "heads": 2}
    foreign = Path(save_tiny(tmp_path / "foreign"))
    before = tree(foreign)
    with pytest.raises(RunError, match=r"was not written by opd"):
        create_model(foreign, task_tokenizer("running_sum"), overwrite=True, **sizes)
    assert tree(foreign) == before
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_text("{}")
    with pytest.raises(RunError, match=r"not empty"):
        create_model(tmp_path / "data", task_tokenizer("running_sum"), **sizes)
    own = create_model(tmp_path / "own", task_tokenizer("running_sum"), **sizes)
    create_model(own, task_tokenizer("running_sum"), seed=1, overwrite=True, **sizes)


def test_a_teachers_memory_makes_room_among_its_own_answers_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "ab").mkdir()
    for name in ("model/model.safetensors", "ab/model.safetensors"):
        (tmp_path / name).write_bytes(b"mine" * 1000)
        os.utime(tmp_path / name, (0, 0))
    memory = Memory(MemorySettings(path=str(tmp_path), gigabytes=4e-6), "teacher")
    for i in range(20):
        ids = torch.tensor([i])
        memory.keep(memory.path(ids, ids), torch.zeros(1, 64))
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "ab" / "model.safetensors").is_file()
    assert sum(f.stat().st_size for f in memory.files._files()) <= 4000


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"student": {"model": "typo", "template": "plain"}}, "no folder with a config.json"),
        ({"student": {"model": "RUN/student", "template": "plain"}}, r"student\.model is .* lies in .* output=PATH"),
    ],
)
def test_a_mistake_under_overwrite_costs_no_finished_run(recipe, tmp_path, changes, match):
    place = tmp_path / "run"
    execute(recipe(place), quiet=True)
    before = tree(place)
    changed = json.loads(json.dumps(changes).replace("RUN", str(place)))
    with pytest.raises(OpdError, match=match):
        execute(recipe(place, **changed), quiet=True, overwrite=True)
    after = tree(place)
    assert {name: after[name] for name in before} == before


def test_a_directory_is_that_of_the_home_that_a_shell_would_take(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipe("~/of-mine").directory == tmp_path / "of-mine"


def test_a_directory_with_a_name_that_no_system_takes_is_one_line(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"output is .*can be no directory here"):
        execute(recipe(tmp_path / ("x" * 300)), quiet=True)


def test_a_report_that_cannot_be_written_is_a_warning(recipe, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise RunError("cannot write the report")

    monkeypatch.setattr("opd.saving.write_report", full)
    result = execute(recipe(tmp_path / "run"), quiet=True)
    assert "the report cannot be written" in capsys.readouterr().err
    assert (result.directory / "summary.json").is_file()
