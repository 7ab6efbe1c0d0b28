"""An extension of griffe: what can be set of a choice or block, inherited settings among them, for the table that
`templates/python/material/pydantic_model.html.jinja` writes in place of a list of names and types."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from operator import attrgetter

from griffe import Class, Extension, Module, Object
from pydantic import BaseModel

from opd.catalogue import settings_of

SECTION = re.compile(r"^(?:Args|Attributes):\n(?: .*\n?|\n(?= ))+", re.M)
TOGETHER = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n\1 +.*)*)", re.M)


class SettingsTables(Extension):
    """Puts rows of `opd.catalogue.settings_of` into `extra["opd"]["settings"]` of every pydantic class of a package;
    names that a docstring describes together get one description each."""

    def on_package(self, *, pkg: Module, **_: object) -> None:
        for found in _objects(pkg):
            if found.docstring is not None:
                found.docstring.value = apart(found.docstring.value)
            if isinstance(found, Class) and "pydantic-model" in found.labels:
                live = _live(found)
                found.extra["opd"]["settings"] = [asdict(row) for row in settings_of(live)]
                kind = live.model_fields.get("kind")
                found.extra["opd"]["kind"] = kind.get_default() if kind is not None and not kind.is_required() else None


def apart(docstring: str) -> str:
    """`low, high: bounds.` among arguments or attributes as two entries; the parser takes it for one odd name."""

    def entries(found: re.Match[str]) -> str:
        indent, names, text = found.groups()
        return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))

    return SECTION.sub(lambda section: TOGETHER.sub(entries, section[0]), docstring)


def _objects(of: Object) -> Iterator[Object]:
    for member in list(of.members.values()):
        if isinstance(member, Object):
            yield member
            yield from _objects(member)


def _live(found: Class) -> type[BaseModel]:
    """The class itself; importing runs nothing that reading its settings does not need."""
    module = found.module.path
    name = found.path.removeprefix(f"{module}.")
    live: type[BaseModel] = attrgetter(name)(importlib.import_module(module))
    return live
