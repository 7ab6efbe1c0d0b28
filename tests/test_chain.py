"""Chains: each link starts from the student that the one before saved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import opd
from opd.api import chain
from opd.cli import main
from opd.cli.main import app
from opd.recipe import load_recipe, shipped_recipes
from tests.test_loop import models, recipe_for  # noqa: F401

ROWS = [{"prompt": f"{i}+1=", "response": str(i + 1), "answer": str(i + 1)} for i in range(12)]


def links(models, tmp_path):  # noqa: F811
    """SFT, then distillation, then reinforcement learning, each for a step or two."""
    shared = {"prompts": {"kind": "inline", "prompts": ROWS}, "verifier": {"kind": "exact_match"}, "steps": 2}
    data = recipe_for(models, tmp_path, **shared, rollout={"max_new_tokens": 3}).dump()
    student = data["student"]

    def link(name, **changes):
        return {**data, "name": name, "output": str(tmp_path / name), **changes}

    return [
        link("sft", objective="sft", rollout={"kind": "data", "max_new_tokens": 4}, teacher=[]),
        link("opd", objective="reverse_kl", student={**student, "model": "not/there"}),
        link("grpo", objective="grpo", teacher=[], student={**student, "model": "not/there"}),
    ]


def test_a_chain_hands_the_student_on(models, tmp_path):  # noqa: F811
    recipes = [opd.recipe.parse_recipe(block) for block in links(models, tmp_path)]
    results = list(chain(recipes, quiet=True))
    assert [r.directory.name for r in results] == ["sft", "opd", "grpo"]
    assert results[1].before["accuracy"] == results[0].after["accuracy"]
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "student").state_dict()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "opd" / "student").state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    # What a link started from stands in its own recipe.
    assert load_recipe(str(tmp_path / "grpo" / "recipe.yaml")).student.model == str(tmp_path / "opd" / "student")


def test_one_command_runs_a_chain(models, tmp_path, monkeypatch, capsys):  # noqa: F811
    files = []
    for block in links(models, tmp_path):
        files.append(str(tmp_path / f"{block['name']}.yaml"))
        (tmp_path / f"{block['name']}.yaml").write_text(yaml.safe_dump(block))
    monkeypatch.setattr("sys.argv", ["opd", "chain", *files, "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert (tmp_path / "grpo" / "summary.json").is_file()
    # Nothing is overwritten, and that is said before the first link runs.
    shutil.rmtree(tmp_path / "sft")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "opd holds a run already" in capsys.readouterr().err
    assert not (tmp_path / "sft" / "recipe.yaml").exists()


def test_overrides_hold_for_all_links_and_a_chain_goes_on(models, tmp_path, monkeypatch, capsys):  # noqa: F811
    files = []
    for block in links(models, tmp_path)[:2]:
        files.append(str(tmp_path / f"{block['name']}.yaml"))
        (tmp_path / f"{block['name']}.yaml").write_text(yaml.safe_dump(block))

    def steps(*words):
        app(["chain", *files, *words, "--quiet"], standalone_mode=False)
        return [json.loads((tmp_path / name / "summary.json").read_text())["steps"] for name in ("sft", "opd")]

    assert steps("steps=1", "checkpoint.every=1") == [1, 1]
    # The second link is begun anew, the first only measured again.
    before = [line for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    shutil.rmtree(tmp_path / "opd")
    assert steps("steps=1", "checkpoint.every=1", "--resume") == [1, 1]
    after = [line for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    assert before == after
    with pytest.raises(opd.RunError, match="give one of them"):
        steps("--resume", "--overwrite")
    with pytest.raises(opd.RecipeError, match="needs recipes"):
        app(["chain", "steps=1"], standalone_mode=False)


def test_links_need_directories_of_their_own(models, tmp_path):  # noqa: F811
    recipe = recipe_for(models, tmp_path)
    with pytest.raises(opd.RunError, match="own name or output"):
        list(chain([recipe, recipe], quiet=True))


def test_a_copy_of_a_shipped_recipe_finds_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(shipped_recipes()["heal"].read_text())
    files = [source for source in load_recipe("mine.yaml").prompts if source.kind == "file"]
    assert files
    assert all(source.load() for source in files)
    # One's own file of that name comes first.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "instructions.jsonl").write_text('{"prompt": "mine"}\n')
    (own,) = [source for source in load_recipe("mine.yaml").prompts if source.kind == "file"]
    assert [prompt.view() for prompt in own.load()] == ["mine"]


def test_every_recipe_that_comes_with_opd_is_valid():
    pytest.importorskip("math_verify")
    for name in shipped_recipes():
        assert load_recipe(name).name
