"""A package of someone else's, and a script, add choices that recipes, the schema and errors treat like ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from opd.catalogue import axes, find, settings_of
from opd.choice import choices_of
from opd.errors import RecipeError
from opd.objectives import Objective
from opd.recipe import json_schema, parse_recipe
from opd.shaping import Shaping

RECIPE = {"student": {"model": "s"}, "teacher": {"model": "t"}, "prompts": {"kind": "inline", "prompts": ["a"]}}

MODULE = '''
from typing import Literal

import torch
from pydantic import Field

from opd.shaping import Shape, Shaper, Shaping


class Halved(Shaping):
    """Every position at half its weight."""

    kind: Literal["halved_elsewhere"] = "halved_elsewhere"
    share: float = Field(0.5, ge=0, description="Of each weight that is left")

    def build(self, context):
        return HalvedShaper()


class HalvedShaper(Shaper):
    def __call__(self, student, targets, micro, settings):
        return Shape(torch.full((micro.positions,), settings.share))
'''


class Halved(Shaping):
    kind: Literal["halved"] = "halved"

    def build(self, context):
        raise NotImplementedError


def installed(folder: Path, module: str) -> dict[str, str]:
    """The environment of a process in which a package with these choices is installed."""
    (folder / "their_choices.py").write_text(module)
    facts = folder / "their_choices-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: their-choices\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[opd.choices]\ntheirs = their_choices\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def opd_of(environment, *arguments):
    command = [sys.executable, "-m", "opd", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_class_that_is_defined_after_the_import_is_a_choice_everywhere():
    recipe = parse_recipe({**RECIPE, "shaping": "halved"})
    assert isinstance(recipe.shaping[0], Halved)
    assert recipe.dump()["shaping"] == [{"kind": "halved"}]
    assert "Halved" in json.loads(json_schema())["$defs"]
    with pytest.raises(RecipeError, match="did you mean 'halved'"):
        parse_recipe({**RECIPE, "shaping": "halfed"})


def test_a_package_adds_a_choice_by_an_entry_point(tmp_path):
    environment = installed(tmp_path, MODULE)
    schema = json.loads(opd_of(environment, "schema").stdout)
    assert schema["$defs"]["Halved"]["properties"]["share"]["minimum"] == 0
    (tmp_path / "r.yaml").write_text(json.dumps({**RECIPE, "shaping": {"kind": "halved_elsewhere", "share": -1}}))
    refused = opd_of(environment, "check", str(tmp_path / "r.yaml"))
    assert refused.returncode == 2
    assert "shaping.share is -1" in refused.stderr


def test_foreign_kinds_are_listed_with_their_package_and_settings(tmp_path):
    environment = {**installed(tmp_path, MODULE), "COLUMNS": "200"}
    listed = opd_of(environment, "choices", "shaping").stdout
    (line,) = [line for line in listed.splitlines() if "halved_elsewhere" in line]
    assert "Every position at half its weight (package their" in line
    assert "uniform" in listed
    shown = opd_of(environment, "choices", "shaping.halved_elsewhere").stdout
    (line,) = [line for line in shown.splitlines() if "share" in line]
    assert all(text in line for text in ("float", "0.5", ">= 0", "Of each weight that is left"))
    refused = opd_of(environment, "choices", "shaping.halfed_elsewhere")
    assert refused.returncode == 2
    assert "did you mean 'halved_elsewhere'" in refused.stderr


def test_every_axis_lists_its_choices_and_their_settings():
    listed = axes()
    assert list(listed)[:3] == ["policy", "teacher", "prompts"]
    assert {each.kind for each in listed["objective"]} == set(choices_of(Objective))
    assert all(each.line for kinds in listed.values() for each in kinds if not each.package and each.kind != "halved")
    settings = {each.key: each for kind in find("policy.causal_lm") for each in settings_of(kind.choice)}
    assert settings["model"].default == "required"
    assert settings["lora.dropout"].bounds == ">= 0.0, < 1.0"
    assert settings["template"].type == "chat | plain"


def test_a_package_that_cannot_be_imported_is_named(tmp_path):
    refused = opd_of(installed(tmp_path, "import no_such_module"), "schema")
    assert refused.returncode == 2
    assert "'their-choices'" in refused.stderr
    assert "no_such_module" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_two_choices_of_one_kind_are_refused_with_both_places():
    class Other(Shaping):
        kind: Literal["uniform"] = "uniform"

        def build(self, context):
            raise NotImplementedError

    try:
        with pytest.raises(RecipeError, match=r"'uniform' is defined in opd\.shaping\.uniform.*Other"):
            choices_of(Shaping)
    finally:
        Other.__annotations__.pop("kind")
