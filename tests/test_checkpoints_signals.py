"""What the machine does to a run: signals, a second writer, crashes, full disks; nothing complete is lost."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from opd.api import execute
from opd.checkpoints.store import folder_of, steps_stored, verify
from opd.errors import OpdError, RunError
from opd.files.whole import locked
from tests.checkpoints import assert_same_run, killed_at, logged, make, models, start, until  # noqa: F401


def test_sigterm_in_a_rollout_finishes_the_step_and_the_rest_is_as_if_undisturbed(make, tmp_path):  # noqa: F811
    slow = {"rollout": {"max_new_tokens": 60}, "checkpoint": {"every": 100}}
    undisturbed, recipe = make("undisturbed", **slow), make("run", **slow)
    execute(undisturbed, quiet=True)
    process = start(recipe, tmp_path)
    until(lambda: logged(recipe) >= 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert "stopped early by SIGTERM" in out
    assert "--resume" in out
    (done,) = steps_stored(recipe.directory)
    assert 2 <= done < 6
    summary = json.loads((recipe.directory / "summary.json").read_text())
    assert (summary["steps"], summary["ended_by"]) == (done, f"SIGTERM after step {done}")
    process = start(recipe, tmp_path, "--resume")
    _out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert_same_run(undisturbed, recipe)


def test_two_writers_and_a_lock_that_ends_with_its_process(make, tmp_path):  # noqa: F811
    recipe = make("run", steps=100000)
    process = start(recipe, tmp_path)
    until(lambda: logged(recipe) >= 3)
    lines = logged(recipe)
    with pytest.raises(RunError, match=f"is being written by process {process.pid} on .*output=PATH"):
        execute(recipe, overwrite=True, quiet=True)
    assert logged(recipe) >= lines
    process.kill()
    process.communicate()
    with locked(recipe.directory):
        pass
    assert execute(make("run", steps=logged(recipe) + 1), resume=True, quiet=True).summary["steps"] == logged(recipe)


def test_what_a_crash_left_of_a_checkpoint_goes_with_the_next_one(make):  # noqa: F811
    execute(make("run", steps=2), quiet=True)
    recipe = make("run", steps=4)
    for name in (".step-00000001.old", ".step-00000009.partial"):
        left = recipe.directory / "checkpoints" / name
        left.mkdir()
        (left / "tensors.safetensors").write_bytes(b"half")
    execute(recipe, resume=True, quiet=True)
    assert steps_stored(recipe.directory)[0] == 4
    assert not list((recipe.directory / "checkpoints").glob(".*"))


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(make, tmp_path):  # noqa: F811
    recipe = make("run", steps=100000)
    process = start(recipe, tmp_path)
    until(lambda: logged(recipe) >= 5)
    process.kill()
    process.communicate()
    kept = steps_stored(recipe.directory)
    room = (folder_of(recipe.directory, kept[0]) / "tensors.safetensors").stat().st_size
    process = start(recipe, tmp_path, "--resume", limit=room - 1000)
    _out, err = process.communicate(timeout=150)
    assert process.returncode == 2
    assert "Traceback" not in err
    message = next(line for line in err.splitlines() if "cannot be written" in line)
    assert f"that of step {kept[0]} is whole" in message
    assert "--resume" in message
    assert steps_stored(recipe.directory) == kept
    verify(folder_of(recipe.directory, kept[0]))
    assert not list((recipe.directory / "checkpoints").glob(".*"))
    execute(make("run", steps=kept[0] + 3), resume=True, quiet=True)


def test_a_log_that_cannot_be_written_is_one_line(make, monkeypatch):  # noqa: F811
    recipe = make("run")
    killed_at(monkeypatch, recipe, 3)
    (recipe.directory / "rollouts.jsonl").unlink()
    (recipe.directory / "rollouts.jsonl").mkdir()
    with pytest.raises(OpdError, match=r"rollouts\.jsonl"):
        execute(recipe, resume=True, quiet=True)
    shutil.rmtree(recipe.directory / "rollouts.jsonl")
    execute(recipe, resume=True, quiet=True)
