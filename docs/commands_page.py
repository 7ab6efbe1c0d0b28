"""A hook of mkdocs: what typer knows about the commands becomes the rest of `cli.md`."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.cli import get_docs_for_click

from opd.cli.main import app


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with a section for each command."""
    if page.file.src_uri != "cli.md":
        return markdown
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="opd")
    commands = text[text.index("## `opd ") :]
    # Of a yes-or-no option both names; the one that is default says nothing.
    return f"{markdown}\n{re.sub(r' / --no-[a-z-]+', '', commands)}"
