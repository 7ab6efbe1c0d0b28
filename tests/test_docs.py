"""What the pages show is accepted, and what can be written is on a page."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import BaseModel

from docs import commands_page
from opd.catalogue import axes
from opd.cli.main import app
from opd.recipe import parse_recipe
from opd.reproductions.verdicts import tally

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


def test_the_readme_counts_verdicts_as_the_results_have_them():
    readme = PAGES[0].read_text(encoding="utf-8")
    for path in sorted((ROOT / "reproductions").glob("*/results.json")):
        claims = json.loads(path.read_text(encoding="utf-8"))["claims"]
        counts = {verdict: number for verdict, number in tally(claims).items() if number}
        told = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
        assert f"of {sum(counts.values())} claims [{told}](docs/reproductions/{path.parent.name}.md)" in readme


def settings(base=BaseModel):
    for kind in base.__subclasses__():
        yield kind
        yield from settings(kind)


def test_every_key_of_a_recipe_says_what_it_is():
    silent = [
        f"{kind.__module__}.{kind.__name__}.{name}"
        for kind in settings()
        if kind.__module__.startswith("opd.") and not kind.__name__.endswith("Header")
        for name, field in kind.model_fields.items()
        if name != "kind" and not field.description
    ]
    assert not silent


def test_the_page_of_commands_has_all_of_them():
    page = commands_page.on_page_markdown("# Command line\n", SimpleNamespace(file=SimpleNamespace(src_uri="cli.md")))
    assert page.startswith("# Command line\n")
    names = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    assert {"train", "watch", "store"} <= names
    assert all(f"## `opd {name}`" in page for name in names)


def test_the_choices_page_has_every_axis_and_choice():
    page = commands_page.on_page_markdown("# Choices\n", SimpleNamespace(file=SimpleNamespace(src_uri="choices.md")))
    assert all(f"### {axis}.{kind.kind}" in page for axis, kinds in axes().items() for kind in kinds)
    assert r"| template | chat \| plain | chat |" in page


def test_the_table_of_axes_has_every_choice_that_comes_with_opd():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    told = {}
    for first, *cells in (row for row in rows if len(row) == 5):
        for axis in re.findall(r"\w+", first.split(" of ")[0].removeprefix("| ")):
            told.setdefault(axis, []).append(cells[1])
    for axis, kinds in axes().items():
        written = set(re.findall(r"`(\w+)`", " ".join(told[axis] + told.get("divergence" * (axis == "objective"), []))))
        ours = {each.kind for each in kinds if each.choice.__module__.startswith("opd.")}
        assert ours <= written, f"docs/design.md, axis {axis}: {sorted(ours - written)} is missing"


def test_the_log_is_newest_first_with_outcomes_and_links_every_older_entry():
    def entries(page):
        titles = [line[3:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
        return [title for title in titles if title != "Older entries"]

    log = ROOT / "LOG.md"
    older = [title for page in sorted((ROOT / "docs" / "log").glob("*.md"), reverse=True) for title in entries(page)]
    titles = entries(log) + older
    assert [title for title in titles if not re.fullmatch(r"\d{4}-\d\d-\d\d .+ \(.+\)", title)] == []
    dates = [title[:10] for title in titles]
    assert dates == sorted(dates, reverse=True)

    # LOG.md is read where anchors are made as GitHub makes them; mkdocs checks only links between its own pages.
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in older]
    links = [
        f"- {title[:10]} [{title[11:]}](docs/log/{title[:10]}.md#{anchor})"
        for title, anchor in zip(older, anchors, strict=True)
    ]
    assert links == [line for line in log.read_text(encoding="utf-8").splitlines() if "](docs/log/" in line]
    for page in {title[:10] for title in older}:
        found = entries(ROOT / "docs" / "log" / f"{page}.md")
        assert found == [title for title in older if title.startswith(page)]
