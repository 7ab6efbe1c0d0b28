"""The reproductions that come with opd: their recipes are valid, and the smoke run of each goes through."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from opd.recipe import parse_recipe
from opd.reproductions.catalogue import shipped
from reproductions.drawn import wins

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
            text = re.sub(r"\{[\w ,.]+\}", "folder", yaml.safe_dump(block, sort_keys=False, default_flow_style=False))
            parse_recipe({**yaml.safe_load(text), "seed": 0})


def test_a_win_is_one_against_every_expert():
    own = {"a": 32, "b": 32, "c": 16, "d": 32}
    experts = {"one": {"a": 0, "b": 32, "c": 16, "d": 20}, "other": {"a": 4, "b": 0, "c": 0, "d": 0}}
    assert wins(own, experts, 32) == 2.0
    assert wins(experts["one"], experts, 32) == 0.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_run_of_a_reproduction_goes_through(name, tmp_path):
    command = [sys.executable, "-m", "opd", "reproduce", name, "--smoke", "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "runs" / "reproductions" / name / "smoke-results.json").is_file()
