"""A run is found again from any directory: its recipe's relative paths belong to where it was started."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from opd.api import execute
from opd.cli.main import app
from opd.errors import RunError
from opd.files.places import anchored, home_of
from opd.recipe import load_recipe
from tests.checkpoints import assert_same_run, killed_at, models  # noqa: F401
from tests.test_loop import TEXTS


@pytest.fixture
def begun(models, tmp_path, monkeypatch):  # noqa: F811
    """`recipe(**changes)` of relative paths alone, in the directory where they lead somewhere."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)

    def recipe(**changes):
        block = {
            "name": "mine",
            "student": {"model": "student", "template": "plain"},
            "teacher": {"model": "teacher", "template": "plain"},
            "prompts": "texts.txt",
            "steps": 4,
            "batch": {"prompts": 4, "micro": 4},
            "rollout": {"max_new_tokens": 6},
            "evaluation": {"held_out": 2},
            "checkpoint": {"every": 2},
            "self_test": False,
            **changes,
        }
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(block))
        return load_recipe("mine.yaml")

    return recipe


def elsewhere(tmp_path, monkeypatch):
    """Another directory, with other texts under the same name."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "texts.txt").write_text("\n".join(f"{i}-1=" for i in range(len(TEXTS))))
    monkeypatch.chdir(tmp_path / "other")


def command(*words):
    result = CliRunner().invoke(app, [*words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_a_run_is_measured_and_exported_from_any_directory(begun, tmp_path, monkeypatch):
    first = execute(begun(), quiet=True)
    run, facts = tmp_path / "runs" / "mine", json.loads((first.directory / "environment.json").read_text())
    assert facts["working_directory"] == str(tmp_path)
    assert str(tmp_path) not in (run / "report.html").read_text().replace(json.dumps(facts["command"])[1:-1], "")
    elsewhere(tmp_path, monkeypatch)
    assert load_recipe(str(run / "recipe.yaml")).prompts[0].path == str(tmp_path / "texts.txt")
    assert json.loads(command("eval", str(run), "--json"))["reverse_kl"] == pytest.approx(first.after["reverse_kl"])
    command("export", str(run), "out")
    exported = load_file(tmp_path / "other" / "out" / "model.safetensors")
    assert all((exported[n] == v).all() for n, v in load_file(run / "student" / "model.safetensors").items())
    # An override is of who writes it.
    changed = load_recipe(str(run / "recipe.yaml"), ["prompts=texts.txt"])
    assert changed.prompts[0].load()[0].fields["prompt"] == "0-1="


def test_a_run_goes_on_from_any_directory(begun, tmp_path, monkeypatch):
    undisturbed = begun(output="runs/undisturbed")
    execute(undisturbed, quiet=True)
    broken = begun()
    killed_at(monkeypatch, broken, 3)
    elsewhere(tmp_path, monkeypatch)
    command("train", str(tmp_path / "runs" / "mine" / "recipe.yaml"), "--resume", "--quiet")
    assert not (tmp_path / "other" / "runs").exists()
    monkeypatch.chdir(tmp_path)
    assert_same_run(undisturbed, broken)
    # Another file of that name is another one, whatever the words are.
    monkeypatch.chdir(tmp_path / "other")
    recipe = [str(tmp_path / "runs" / "mine" / "recipe.yaml"), [f"output={tmp_path}/runs/mine", "prompts=texts.txt"]]
    with pytest.raises(RunError, match=r'prompts\.0\.path \.\.\..*/texts\.txt" -> "texts\.txt"'):
        execute(load_recipe(*recipe), resume=True, quiet=True)


def test_only_places_that_are_there_are_taken_for_places(tmp_path):
    for name in ("student", "file", "org/model", "words"):
        (tmp_path / name).mkdir(parents=True)
    block = {
        "student": {"kind": "causal_lm", "model": "student", "tokenizer": "elsewhere"},
        "teacher": [
            {"kind": "local", "model": "org/model", "tokenizer": "own:words"},
            {"kind": "served", "url": "http://127.0.0.1:1", "model": "student", "tokenizer": "student"},
            {"kind": "local", "model": str(tmp_path / "student")},
        ],
        "prompts": [
            {"kind": "file", "path": "file", "column": "student", "add": {"path": "student"}},
            {"kind": "inline", "prompts": [{"prompt": "x", "path": "student"}]},
        ],
    }
    assert anchored(block, tmp_path) == {
        "student": {"kind": "causal_lm", "model": f"{tmp_path}/student", "tokenizer": "elsewhere"},
        "teacher": [
            {"kind": "local", "model": f"{tmp_path}/org/model", "tokenizer": f"own:{tmp_path}/words"},
            {"kind": "served", "url": "http://127.0.0.1:1", "model": "student", "tokenizer": f"{tmp_path}/student"},
            {"kind": "local", "model": str(tmp_path / "student")},
        ],
        "prompts": [
            {"kind": "file", "path": f"{tmp_path}/file", "column": "student", "add": {"path": "student"}},
            {"kind": "inline", "prompts": [{"prompt": "x", "path": "student"}]},
        ],
    }


@pytest.mark.parametrize("facts", ["{}", "{", '{"working_directory": 3}', '{"working_directory": "/gone/for/good"}'])
def test_a_record_that_says_no_directory_is_read_as_it_stands(tmp_path, facts):
    (tmp_path / "environment.json").write_text(facts)
    assert home_of(tmp_path / "recipe.yaml") is None
