"""Formats of drafters besides the native one: what each calls the weights, and what its config says of them."""

from __future__ import annotations

from opd.drafting.formats.base import Format, Made, difference, write
from opd.drafting.formats.speculators import Speculators
from opd.drafting.formats.transformers import Assistant

__all__ = ["FORMATS", "NATIVE", "Format", "Made", "difference", "write"]

NATIVE = "native"
"""The format of a run's `student`, which `student.model` takes."""

FORMATS: dict[str, Format] = {"speculators": Speculators(), "transformers": Assistant()}
