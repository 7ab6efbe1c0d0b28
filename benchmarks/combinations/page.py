"""The generated part of docs/combinations.md: tables of what goes with what, and the reasons of what does not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

from benchmarks.combinations.parts import KEYS, LISTS
from benchmarks.combinations.table import Found, Result

STUDENTS = {
    "causal_lm": "Language models",
    "image_text": "Image-text models",
    "draft": "Drafters",
    "flow_transformer": "Flow models",
    "action_tokens": "Policies that act",
}
WORKS, TOLD = "✓", "○"


NAMED = re.compile(r"'([^']+)'")


class Reasons:
    """Messages of one table by number, in the order in which they are met. Messages that differ in the choice that they
    name first are one, with all those names."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], int] = {}
        self.names: dict[int, list[str]] = {}

    def of(self, reason: str) -> int:
        found = NAMED.search(reason)
        before, after = (reason[: found.start()], reason[found.end() :]) if found else (reason, "")
        number = self.numbers.setdefault((before, after), len(self.numbers) + 1)
        names = self.names.setdefault(number, [])
        if found and found[1] not in names:
            names.append(found[1])
        return number

    def listed(self) -> str:
        """The list below the table, a paragraph a message; empty where nothing is refused."""
        return "\n".join(
            f"{number}. {_escaped(before)}{_either(self.names[number])}{_escaped(after)}\n"
            for (before, after), number in self.numbers.items()
        )


def generated(results: Sequence[Result]) -> str:
    """The page below its first words."""
    pairs = [found for result in results for found in result.pairs]
    works, told, refused = (sum(f.verdict == verdict for f in pairs) for verdict in ("works", "told", "refused"))
    singles = sum(found.verdict == "refused" for result in results for found in result.singles)
    text = (
        f"**{works + told} of {len(pairs)} pairs run, and {refused} are refused at the start.** In {told} of "
        "those that run the teacher trains nothing, and a line at the start says so. Not counted are the choices that "
        f"a kind of student refuses whatever is beside them, {singles} in all. {WORKS}: it runs; {TOLD}: it runs, and "
        "one of the two changes nothing; a number: it is refused, with the message of that number below the table.\n"
    )
    for result in results:
        body = _alone(result) + (_tables(result) if result.pairs else "")
        text += f"\n## {STUDENTS[result.task]}: `{result.task}`\n\n{body}"
    return text


def _alone(result: Result) -> str:
    """Choices that the kind of student takes or refuses as such."""
    fitting = {
        axis: [name for name in names if f"{axis}.{name}" not in result.refused]
        for axis, names in result.choices.items()
    }
    text = ""
    if not result.pairs:
        told = "; ".join(f"{axis} {_kinds(names)}" for axis, names in fitting.items() if names)
        text += f"Each choice was tried by itself. These run: {told}.\n\n"
    if result.refused:
        reasons = Reasons()
        told = ", ".join(f"{_named(choice)} ({reasons.of(reason)})" for choice, reason in result.refused.items())
        text += f"Refused whatever is beside them: {told}.\n\n{reasons.listed()}"
    return text


def _tables(result: Result) -> str:
    """A table for each two axes with a refusal among their pairs, and the others by name."""
    axes = [axis for axis in KEYS if any(name for name in result.choices.get(axis, ()))]
    between = [*combinations(axes, 2), *((axis, axis) for axis in axes if axis in LISTS)]
    whole, text = [], ""
    for first, second in between:
        found = [f for f in result.pairs if {_axis(f.a), _axis(f.b)} == {first, second}]
        if not found:
            continue
        if all(f.verdict == "works" for f in found):
            whole.append(f"{first} × {second}")
        else:
            text += _table(result, first, second, found)
    return (f"\nEverything runs in {', '.join(whole)}.\n" if whole else "") + text


def _table(result: Result, first: str, second: str, found: Sequence[Found]) -> str:
    """The table and its messages."""
    reasons = Reasons()
    rows, columns = (
        [n for n in result.choices[axis] if f"{axis}.{n}" not in result.refused] for axis in (first, second)
    )
    if len(columns) > len(rows):
        first, second, rows, columns = second, first, columns, rows
    by_pair = {frozenset((f.a, f.b)): f for f in found}

    def cell(row: str, column: str) -> str:
        each = by_pair.get(frozenset((f"{first}.{row}", f"{second}.{column}")))
        if each is None:
            return ""
        if each.verdict == "works":
            return WORKS
        return f"{TOLD} {reasons.of(each.reason)}" if each.verdict == "told" else str(reasons.of(each.reason))

    cells = {row: [cell(row, column) for column in columns] for row in rows}
    # A row without a refusal says nothing that the sentence above the table does not.
    shown = {row: line for row, line in cells.items() if set(line) - {WORKS, ""}}
    plain = [row for row in rows if row not in shown]
    title = first if first == second else f"{first} × {second}"
    text = f"\n### {title}\n\n| | {' | '.join(f'`{column}`' for column in columns)} |\n|{'---|' * (len(columns) + 1)}\n"
    text += "".join(f"| `{row}` | {' | '.join(line)} |\n" for row, line in shown.items())
    text += f"\nWith all of them: {_kinds(plain)}.\n" if plain else ""
    return text + (f"\n{reasons.listed()}" if reasons.numbers else "")


def _axis(choice: str) -> str:
    return choice.partition(".")[0]


def _named(choice: str) -> str:
    axis, _, name = choice.partition(".")
    return f"{axis} `{name}`"


def _either(names: Sequence[str]) -> str:
    """`a`, `b` or `c`."""
    return " or ".join(part for part in (_kinds(names[:-1]), _kinds(names[-1:])) if part)


def _kinds(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _escaped(text: str) -> str:
    """A message that a page of Markdown shows as it is."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
