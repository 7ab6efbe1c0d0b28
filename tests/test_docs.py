"""What the pages show is accepted: YAML blocks are parts of a recipe, the call in the README is one of `distill`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from opd.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REST = {
    "student": {"model": "org/small"},
    "teacher": {"model": "org/large"},
    "prompts": {"kind": "inline", "prompts": ["a"]},
}


def blocks(language):
    for page in PAGES:
        for i, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)):
            yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}")


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_on_a_page_is_part_of_a_recipe(text):
    parse_recipe(REST | yaml.safe_load(text))


def test_the_call_in_the_readme_is_accepted():
    (text,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    (call,) = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "opd.distill")
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    names = {key: {"model": given.pop(key)} for key in ("student", "teacher")}
    assert {"objective", "update", "steps"} <= given.keys()
    parse_recipe(given | names | {"prompts": REST["prompts"]})
