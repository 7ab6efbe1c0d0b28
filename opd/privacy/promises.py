"""What private runs promised of the models that a run learns from. A promise stands in the `opd.json` of the student of
a private run, and in those of all students that come of it: who gets one of them gets what it says of the records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd.errors import ModelError
from opd.privacy.accounting import epsilon_of
from opd.privacy.spending import FILE, Spending
from opd.provenance import ORIGIN, read_origin

KEY = "privacy"
"""Of `opd.json`: a list of promises."""
MODELS = "private_models"
"""Of summary.json: the same, of the models that a run learnt from."""


@dataclass(frozen=True)
class Promise:
    """That a model hides each record of a private run.

    Attributes:
        model: what is named for people: the run's name.
        epsilon: None where some step had no noise, which promises nothing.
        records: how many the run had; None where its record does not say so.
    """

    model: str
    epsilon: float | None
    delta: float
    records: int | None = None

    def __str__(self) -> str:
        spent = "no epsilon" if self.epsilon is None else f"epsilon {self.epsilon:.4g} at delta {self.delta:.3g}"
        return f"{self.model} ({spent}{'' if self.records is None else f', {self.records} records'})"


def own(name: str, facts: Mapping[str, Any] | None) -> list[Promise]:
    """The promise of a run, by the `privacy` of its summary; none of one that is not private."""
    if facts is None:
        return []
    return [Promise(name, facts["epsilon"], facts["delta"], facts["records"])]


def of_run(directory: Path, name: str) -> list[Promise]:
    """The same of a run that has no summary, by its account.

    Raises:
        RunError: that cannot be read.
    """
    path = directory / FILE
    if not path.is_file():
        return []
    spending = Spending(0.0, "rdp")
    spending.read(directory)
    facts = json.loads(path.read_text(encoding="utf-8"))
    exact = all(part.noise > 0 for part in spending.parts)
    found = epsilon_of(spending.parts, facts["delta"], facts["accountant"]) if exact else None
    return [Promise(name, found, facts["delta"])]


def before(*blocks: object) -> list[Promise]:
    """The promises of the models that blocks of a recipe name by their folders, each once.

    Raises:
        ModelError: an `opd.json` says something else.
    """
    found = [promise for folder in dict.fromkeys(_folders(blocks)) for promise in read(folder)]
    return list(dict.fromkeys(found))


def read(folder: Path) -> list[Promise]:
    """The promises that stand beside a model's weights.

    Raises:
        ModelError: they are not as `opd` writes them.
    """
    try:
        return [Promise(**entry) for entry in read_origin(folder).get(KEY, [])]
    except TypeError:
        raise ModelError(f"{folder / ORIGIN}: {KEY} is not as opd writes it; mend or remove the file") from None


def in_summary(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of the models that the run of a dumped recipe learnt from; nothing where none is private."""
    found = before(*(recipe[axis] for axis in ("student", "teacher", "rollout")))
    return {MODELS: [asdict(promise) for promise in found]} if found else {}


def listed(summary: Mapping[str, Any]) -> list[Promise]:
    """The promises that `in_summary` wrote."""
    return [Promise(**entry) for entry in summary.get(MODELS, [])]


def written(promises: Iterable[Promise]) -> dict[str, Any]:
    """Facts for `write_origin`."""
    found = [asdict(promise) for promise in dict.fromkeys(promises)]
    return {KEY: found} if found else {}


def together(promises: Iterable[Promise]) -> str:
    """What holds for a record that is in all these runs: epsilons and deltas add up."""
    all_ = list(promises)
    epsilons = [promise.epsilon for promise in all_]
    if None in epsilons:
        return "no epsilon"
    total = sum(epsilon for epsilon in epsilons if epsilon is not None)
    return f"epsilon {total:.4g} at delta {sum(promise.delta for promise in all_):.3g}"


def _folders(value: object) -> Iterator[Path]:
    if isinstance(value, Mapping):
        model = value.get("model")
        if isinstance(model, str) and (folder := Path(model).expanduser()).is_dir():
            yield folder
        for each in value.values():
            yield from _folders(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _folders(each)
