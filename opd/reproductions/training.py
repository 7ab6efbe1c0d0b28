"""The ready-made job: one recipe, run from start to finish."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opd.errors import RunError
from opd.reproductions.definition import COSTS, Figures


def train(folder: Path, inputs: Mapping[str, Path], *, recipe: Mapping[str, Any], seed: int) -> Figures:
    """Run `recipe` with `seed` in `folder/run`; the trained student lies in `folder/run/student`.

    In the recipe's texts `{NAME}` stands for the folder of the input NAME: `model: "{teacher}/model"`.

    Returns:
        The last held-out metrics; `COSTS`, summed over the training steps; `curve`, the metrics and costs so far at
        each evaluation; `items`, with a verifier the accuracy on each held-out prompt.

    Raises:
        OpdError: as `execute` does.
    """
    from opd.api import execute
    from opd.recipe import parse_recipe

    values = {"tracking": {"trackers": []}, **filled(recipe, inputs), "seed": seed, "output": str(folder / "run")}
    result = execute(parse_recipe(values, "recipe of this arm"), quiet=True)
    if result.stopped_by is not None:
        raise RunError(f"training was stopped by signal {result.stopped_by}")
    points = list(curve(result.history))
    last = {name: value for name, value in points[-1].items() if name != "step"}
    return {**last, "curve": points, "items": result.items}


def curve(history: Iterable[Mapping[str, float]]) -> Iterable[dict[str, float]]:
    """One point an evaluation: `step`, what training had cost until then, and the held-out metrics."""
    costs = dict.fromkeys(COSTS, 0.0)
    for record in history:
        for name in COSTS:
            costs[name] += record.get(f"train/{name}", 0.0)
        metrics = {n.removeprefix("held_out/"): v for n, v in record.items() if n.startswith("held_out/")}
        if metrics:
            yield {"step": record["step"], **costs, **metrics}


def filled(value: Any, inputs: Mapping[str, Path]) -> Any:
    """`value` with `{NAME}` replaced by the folder of the input NAME in every text, however deep."""
    if isinstance(value, str):
        for name, folder in inputs.items():
            value = value.replace(f"{{{name}}}", str(folder))
        return value
    if isinstance(value, Mapping):
        return {key: filled(item, inputs) for key, item in value.items()}
    return [filled(item, inputs) for item in value] if isinstance(value, list | tuple) else value
