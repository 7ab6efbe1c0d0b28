"""Procedural tasks: problems without end, with a reference completion, an exact answer and a check of every step."""

from opd.procedural.base import ANSWER_PATTERN, SPLITS, Example, Range, Split, Task

__all__ = ["ANSWER_PATTERN", "SPLITS", "Example", "Range", "Split", "Task"]
