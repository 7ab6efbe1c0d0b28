"""The model card of a saved student: what it is, from the recipe and what was measured. A recipe's own description is
not repeated: it may have been written about another one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.privacy import promises
from opd.provenance import held_out_told, models_of, student_of
from opd.recipe import Recipe


def model_card(recipe: Recipe, summary: Mapping[str, Any], library: str) -> str:
    """README.md of a saved student, which `library` loads; `summary` is what summary.json holds of its run."""
    rows = "\n".join(
        f"| {name} | {summary['before'].get(name, math.nan):.4f} | {value:.4f} |"
        for name, value in summary["after"].items()
    )
    measured = f"| {held_out_told(summary)} | before | after |\n|---|---|---|\n{rows}\n"
    return f"{card(recipe, library, summary['steps'])}\n{_privacy(summary)}{measured}"


def card(recipe: Recipe, library: str, steps: int) -> str:
    """The card without measurements: of a student after `steps` of the recipe's."""
    block = recipe.dump()
    teachers = ", ".join(f"`{models_of(_public(teacher))}`" for teacher in block["teacher"]) or "no teacher"
    objectives = " + ".join(f"`{objective['kind']}`" for objective in block["objective"])
    views = [text for teacher in block["teacher"] for text in _views(teacher)]
    student = student_of(_public(block["student"]))
    told = [
        f"Student `{student}`{_made_of(block['student'])} trained by {teachers} with `opd`: "
        f"objective {objectives}, rollout `{block['rollout']['kind']}`, {steps} steps of "
        f"{recipe.batch.prompts * recipe.batch.group} trajectories, seed {recipe.seed}.",
        *views,
        f"Prompts: {', '.join(_source(source) for source in block['prompts'])}.",
    ]
    return f"{_front(block, library)}# {recipe.name}\n\n" + "".join(f"{text}\n\n" for text in told).rstrip("\n") + "\n"


def _front(block: Mapping[str, Any], library: str) -> str:
    """What hubs read of a card. Names of the hub alone: a folder of this machine is nobody else's."""
    lines = [f"library_name: {library}", "tags: [on-policy-distillation, opd]"]
    base = block["student"].get("model")
    if _on_the_hub(base):
        lines.append(f"base_model: {base}")
    sets = [each["path"] for each in block["prompts"] if each["kind"] == "dataset" and _on_the_hub(each["path"])]
    if sets:
        lines.append(f"datasets: {json.dumps(sorted(set(sets)))}")
    return "---\n" + "\n".join(lines) + "\n---\n\n"


def _on_the_hub(name: object) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def _public(block: Any) -> Any:
    """A block of the recipe in which models of this machine have their folder's name alone: where that lies is nobody
    else's."""
    if isinstance(block, Mapping):
        return {key: _shown(value) if key == "model" else _public(value) for key, value in block.items()}
    return block


def _shown(model: object) -> object:
    if not isinstance(model, str) or _on_the_hub(model) or model.startswith("package:"):
        return model
    # Of a folder that is named by where it stands (`.`, `..`) the name is what that place is called.
    return Path(model).name if Path(model).name not in ("", "..") else Path(model).expanduser().resolve().name


def _made_of(student: Mapping[str, Any]) -> str:
    """What is not as the named model has it, and what was trained of it."""
    dropped, lora, frozen = (student.get(key) for key in ("drop_layers", "lora", "freeze"))
    parts = [f"without its layers {_ranges(dropped)}"] if dropped else []
    parts += [f"with LoRA of rank {lora['rank']}"] if lora else []
    parts += [f"with {', '.join(frozen)} as before"] if frozen else []
    return f" ({', '.join(parts)})" if parts else ""


def _ranges(numbers: Sequence[int]) -> str:
    """`3, 10-17`: neighbours as one range."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def _views(teacher: Mapping[str, Any]) -> list[str]:
    """What a teacher saw that the student did not."""
    found = []
    for each in (teacher, *teacher.get("routes", {}).values()):
        seen = [f"the column `{each['sees']}`"] if each.get("sees") else []
        seen += [f"the system text {json.dumps(each['system'], ensure_ascii=False)}"] if each.get("system") else []
        count = len(each.get("examples") or ())
        seen += [f"{count} example{'s' if count > 1 else ''} before each prompt"] if count else []
        if seen:
            mode = f", {each['mode']}" if each.get("mode") else ""
            found.append(
                f"The teacher ({models_of(_public(each))}{mode}) saw {' and '.join(seen)}; the student did not."
            )
    return found


def _source(source: Mapping[str, Any]) -> str:
    """Where prompts came from; of a file of this machine the name alone."""
    if source["kind"] == "boxed":
        return _source(source["of"])
    path = source.get("path")
    if path is None:
        tasks = source.get("tasks") or source.get("task")
        named = tasks.get("kind") if isinstance(tasks, dict) else ", ".join(tasks) if isinstance(tasks, list) else ""
        return f"{source['kind']} ({named})" if named else str(source["kind"])
    return f"`{path if source['kind'] == 'dataset' and _on_the_hub(path) else Path(path).name}`"


def _privacy(summary: Mapping[str, Any]) -> str:
    """What private runs promise of a student, for whoever gets it: its own, and those of the models it learnt from."""
    spent, models = summary.get("privacy"), promises.listed(summary)
    told = _spent(spent) if spent is not None and spent["epsilon"] is not None else ""
    if models:
        names = " and ".join(map(str, models))
        told += f"It learnt from models of private runs: {names}. "
        if told.startswith("Differentially"):
            all_ = [*promises.own("", spent), *models]
            told += f"For a record that was in all of these runs the sums hold: {promises.together(all_)}.\n\n"
        else:
            told += "What they promise of their records it promises too, of those that its own run did not see.\n\n"
    return told


def _spent(spent: Mapping[str, Any]) -> str:
    known = " to who does not know its seeds" if spent["seed_known"] else ""
    # A run that went on with other settings has steps of several kinds, and its settings are those of the last.
    steps = " and ".join(
        f"{part['steps']} Poisson draws of rate {part['sampling_rate']:.4g} with noise of "
        f"{part['noise_multiplier']:g} clipping norms"
        for part in spent["spent"]
    )
    return (
        f"Differentially private{known}: epsilon {spent['epsilon']:.4g} at delta {spent['delta']:.3g} for each of "
        f"{spent['records']} records, added or removed ({spent['accountant']}; {steps or 'no step'}).\n\n"
    )
