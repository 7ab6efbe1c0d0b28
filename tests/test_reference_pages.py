"""The reference as it is built: a page of two objects, by the site's own extension and templates."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from docs.settings_tables import apart
from opd.divergences.jensen_shannon import JensenShannon

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The text of a page's rows and lines, one each, without markup."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(
        "# Two\n\n::: opd.divergences.jensen_shannon.JensenShannon\n\n::: opd.api.Result\n", encoding="utf-8"
    )
    whole = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    (plugin,) = (each for each in whole["plugins"] if "mkdocstrings" in each)
    options = plugin["mkdocstrings"]["handlers"]["python"]["options"]
    options["extensions"] = [str(ROOT / each) if each.endswith(".py") else each for each in options["extensions"]]
    plugin["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    plugin["mkdocstrings"]["custom_templates"] = str(ROOT / "docs/templates")
    small = {"site_name": "two", "theme": {"name": "material", "font": False}, "plugins": [plugin]}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(small), encoding="utf-8")
    build(load_config(str(folder / "mkdocs.yml"), site_dir=str(folder / "site")))
    text = (folder / "site" / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", text.partition("<article")[2])
    rows = re.sub(r"<[^>]+>", " ", re.sub(r"</(?:tr|p|h\d|li|div)>", "\n", text))
    return [" ".join(html.unescape(row).split()) for row in rows.splitlines()]


def test_every_setting_of_a_choice_has_a_row_with_its_meaning_inherited_ones_too(page):
    rows = {row.split(" ", 1)[0]: row for row in page if row.split(" ", 1)[0] in {"beta", "weight", "top_k", "end"}}
    assert rows["weight"] == "weight float or a schedule 1.0 >= 0 Factor of this term", "of every objective"
    assert rows["end"].startswith("end learn | mask learn"), "of every objective"
    assert rows["top_k"].startswith("top_k int | null or a schedule null >= 1 Compare over K ids"), "of a support"
    assert rows["beta"].startswith("beta "), "its own"
    for name, field in JensenShannon.model_fields.items():
        if name == "kind":
            continue
        told = " ".join((field.description or name).replace("`", "").split())
        assert sum(told in row for row in page) == 1, f"{name} is described once"
    assert not any("_meant" in row for row in page), "what checks settings is private"


def test_a_choice_says_what_recipes_call_it_and_where_it_lies(page):
    assert "kind: jensen_shannon in opd.divergences.jensen_shannon" in page


def test_attributes_described_together_are_two(page):
    assert any(row.startswith("before dict") for row in page)
    assert any(row.startswith("after dict") for row in page)
    assert not any(row.startswith("before,") for row in page)


def test_names_described_together_are_set_apart_in_their_sections_alone():
    text = "One of two, a kind.\n\nArgs:\n    low, high: bounds of\n        it.\n    x: else.\n\nLater, then: no.\n"
    both = "    low: bounds of\n        it.\n    high: bounds of\n        it.\n"
    assert apart(text) == f"One of two, a kind.\n\nArgs:\n{both}    x: else.\n\nLater, then: no.\n"
