"""A hook of mkdocs: what typer knows about the commands becomes the rest of `cli.md`, what recipes can name that of
`choices.md`, and what logged numbers mean that of `howto/metrics.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from typer.cli import get_docs_for_click

from opd.catalogue import Kind, axes, settings_of
from opd.cli.main import app
from opd.report.glossary import MEANINGS

CLASS = re.compile(r"^::: \S+\.[A-Z]\w*$(?!\n +options)", re.M)
"""A class on a page of its axis has a heading of its name alone; below it stands where it lies."""

GROUPS = {
    "held_out/": "Held out: the student's own answers to prompts that it never trains on",
    "report/": "The report: what was asked for it alone",
    "train/": "Training: one step",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with a section for each command, for each axis, or for each group of metrics; of others with short
    headings."""
    if page.file.src_uri == "choices.md":
        return "\n".join([markdown, *choices()])
    if page.file.src_uri == "howto/metrics.md":
        return "\n".join([markdown, *metrics()])
    if page.file.src_uri != "cli.md":
        return CLASS.sub(r"\g<0>\n    options: {show_root_full_path: false}", markdown)
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="opd")
    commands = text[text.index("## `opd ") :]
    # Of a yes-or-no option both names; the one that is default says nothing.
    return f"{markdown}\n{re.sub(r' / --no-[a-z-]+', '', commands)}"


def metrics() -> Iterator[str]:
    """Lines: a table for each group of `opd.report.glossary`, families of names among them."""
    for group, title in GROUPS.items():
        yield f'## {title}\n\n<div class="names" markdown>\n\n| name | unit | means | better |\n|---|---|---|---|'
        for name, meaning in MEANINGS.items():
            if not name.startswith(group):
                continue
            shown = f"{name}NAME" if name.endswith("/") else name
            about = f"{meaning.title}: {meaning.about}" if meaning.about else meaning.title
            cells = (f"`{shown}`", meaning.unit, about, meaning.better)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield "\n</div>\n"


def choices() -> Iterator[str]:
    """Lines: a section for each axis, with a table of each choice's settings."""
    for axis, kinds in axes().items():
        yield f"## {axis}\n"
        for kind in kinds:
            yield from _choice(kind)


def _choice(kind: Kind) -> Iterator[str]:
    whose = f" (package {kind.package})" if kind.package else ""
    yield f"### {kind.axis}.{kind.kind}{whose}\n\n{kind.line}.\n"
    rows = list(settings_of(kind.choice))
    if rows:
        yield "| setting | type | default | bounds | |\n|---|---|---|---|---|"
    for row in rows:
        cells = (row.key, row.type, row.default, row.bounds, row.description)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
