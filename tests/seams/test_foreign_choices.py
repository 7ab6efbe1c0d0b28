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


TOGETHER = """
import contextlib, io, json, sys
from opd.cli.main import main

answers = []
for words in json.load(sys.stdin):
    sys.argv, out, err, code = ["opd", *words], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""
"""Several commands in one fresh process: most of the time of one is imports."""


def opd_of(environment, *commands):
    """What each command returned, printed and complained of."""
    process = [sys.executable, "-c", TOGETHER]
    said = json.dumps(commands)
    done = subprocess.run(process, env=environment, input=said, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_a_class_that_is_defined_after_the_import_is_a_choice_everywhere():
    recipe = parse_recipe({**RECIPE, "shaping": "halved"})
    assert isinstance(recipe.shaping[0], Halved)
    assert recipe.dump()["shaping"] == [{"kind": "halved"}]
    assert "Halved" in json.loads(json_schema())["$defs"]
    with pytest.raises(RecipeError, match="did you mean 'halved'"):
        parse_recipe({**RECIPE, "shaping": "halfed"})


def test_a_package_adds_a_choice_by_an_entry_point(tmp_path):
    environment = {**installed(tmp_path, MODULE), "COLUMNS": "200"}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**RECIPE, "shaping": {"kind": "halved_elsewhere", "share": -1}}))
    kinds = ["shaping", "shaping.halved_elsewhere", "shaping.halfed_elsewhere"]
    commands = [["schema"], ["check", str(path)], *(["choices", kind] for kind in kinds)]
    schema, refused, listed, shown, unknown = opd_of(environment, *commands)
    assert json.loads(schema[1])["$defs"]["Halved"]["properties"]["share"]["minimum"] == 0
    assert refused[0] == 2
    assert "shaping.share is -1" in refused[2]
    # Foreign kinds are listed with their package and settings.
    (line,) = [line for line in listed[1].splitlines() if "halved_elsewhere" in line]
    assert "Every position at half its weight (package their" in line
    assert "uniform" in listed[1]
    (line,) = [line for line in shown[1].splitlines() if "share" in line]
    assert all(text in line for text in ("float", "0.5", ">= 0", "Of each weight that is left"))
    assert unknown[0] == 2
    assert "did you mean 'halved_elsewhere'" in unknown[2]


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
    (refused,) = opd_of(installed(tmp_path, "import no_such_module"), ["schema"])
    assert refused[0] == 2
    assert "'their-choices'" in refused[2]
    assert "no_such_module" in refused[2]
    assert "Traceback" not in refused[2]


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
