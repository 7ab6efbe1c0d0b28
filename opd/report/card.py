"""What a run was, in the few lines that stand on top of its page: who learnt from whom, on what, and for how long."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.privacy import promises
from opd.provenance import models_of, student_of
from opd.report.curves import number

Block = Mapping[str, Any]


def facts(recipe: Block, summary: Block, environment: Block) -> list[tuple[str, str]]:
    """`(name, text)` of everything that is known, in the order of the page. Of what a file does not say nothing is
    guessed."""
    models = _block(environment.get("models"))
    student = _block(_public(recipe.get("student")))
    teachers = [_block(_public(one)) for one in _blocks(recipe.get("teacher"))]
    listed = models.get("teachers")
    sizes = [_block(size) for size in listed] if isinstance(listed, list) else []
    objectives = " + ".join(_of(one, "kind") for one in _blocks(recipe.get("objective")))
    found = {
        "name": _of(recipe, "name"),
        "about": _of(recipe, "description"),
        "student": _with_size(student_of(_public(recipe.get("student"))), _block(models.get("student"))),
        "teacher": "; ".join(_teacher(one, sizes[i : i + 1], len(teachers)) for i, one in enumerate(teachers)),
        "what differs": "; ".join(differences(student, teachers, _block(models.get("student")), sizes, summary)),
        "data": _data(recipe, summary),
        "objective": f"{objectives}{_rollout(recipe)}" if objectives else _rollout(recipe).removeprefix(", "),
        "steps": _steps(recipe, summary),
        "privacy": _spent(summary.get("privacy")),
        "private models": _promised(summary),
        "time": _time(summary),
        "peak memory": _memory(summary),
        "end": _end(summary),
        "seed": _of(recipe, "seed"),
    }
    return [(name, text) for name, text in found.items() if text]


def differences(
    student: Block, teachers: Sequence[Block], own: Block, sizes: Sequence[Block], summary: Block
) -> list[str]:
    """In what the teachers differ from the student, a phrase each; `own` and `sizes` are what environment.json says of
    their models."""
    found = []
    if len(teachers) == 1 and len(sizes) == 1:
        found += [
            f"{name} {_count(own[key])} (student), {_count(sizes[0][key])} (teacher)"
            for key, name in (("layers", "layers"), ("width", "width"), ("parameters", "parameters"))
            if key in own and key in sizes[0] and own[key] != sizes[0][key]
        ]
    dropped = student.get("drop_layers")
    if isinstance(dropped, list) and dropped:
        found.append(f"{len(dropped)} layers were taken out of the student")
    lora = student.get("lora")
    if isinstance(lora, Mapping):
        found.append(f"the student learns in adapters (LoRA, rank {lora.get('rank')})")
    for teacher in teachers:
        for one in (teacher, *_block(teacher.get("routes")).values()):
            found += _views(_block(one))
    if not found and teachers and all(one.get("kind") == "self" for one in teachers):
        found.append("only the weights: the student's own, as they were or as they follow it")
    lengths = _block(summary.get("prompt_tokens"))
    if {"student", "teacher"} <= lengths.keys() and lengths["student"] != lengths["teacher"]:
        found.append(f"held-out prompts of {lengths['student']} tokens (student) and {lengths['teacher']} (teacher)")
    return list(dict.fromkeys(found))


def _views(teacher: Block) -> list[str]:
    found = []
    if teacher.get("sees"):
        found.append(f"the teacher reads the column {teacher['sees']}")
    if teacher.get("system"):
        found.append("the teacher has a system text")
    examples = teacher.get("examples")
    if isinstance(examples, list) and examples:
        found.append(f"the teacher has {len(examples)} example{'s' * (len(examples) > 1)} before each prompt")
    if teacher.get("adapter"):
        found.append("the teacher has an adapter")
    tokenizer = teacher.get("tokenizer")
    if isinstance(tokenizer, str) and (tokenizer == "own" or tokenizer.startswith("own:")):
        found.append("the teacher has another tokenizer")
    return found


SELF = {
    "frozen": "the student itself, as it was before training",
    "ema": "the student itself, as a running mean of its weights",
    "live": "the student itself, as it is at each step",
    "trust_region": "the student itself, between what it was and what it is",
}


def _teacher(teacher: Block, size: Sequence[Block], of: int) -> str:
    if teacher.get("kind") == "self":
        return SELF.get(str(teacher.get("mode")), "the student itself")
    return _with_size(models_of(dict(teacher)), size[0] if size and of == 1 else {})


def _with_size(name: str, size: Block) -> str:
    parts = [f"{size['layers']} layers"] if "layers" in size else []
    parts += [f"width {size['width']}"] if "width" in size else []
    parts += [f"{_count(size['parameters'])} parameters"] if size.get("parameters") else []
    return f"{name} ({', '.join(parts)})" if name and parts else name


def _data(recipe: Block, summary: Block) -> str:
    """Where prompts come from, by name alone: where a file lies is nobody else's."""
    sources = []
    for one in _blocks(recipe.get("prompts")):
        path = one.get("path")
        if isinstance(path, str):
            sources.append(path if one.get("kind") == "dataset" and path[:1] not in "./~" else Path(path).name)
        else:
            sources.append(_of(one, "task", "environment", "kind"))
    held = summary.get("held_out_prompts", _block(recipe.get("evaluation")).get("held_out"))
    told = ", ".join(dict.fromkeys(source for source in sources if source))
    return f"{told}; {held} prompts held out" if told and isinstance(held, int) and held else told


def _rollout(recipe: Block) -> str:
    kind = _of(recipe.get("rollout"), "kind")
    written = {"student": "the student", "teacher": "the teacher", "data": "the data"}
    return f", on answers written by {written[kind]}" if kind in written else f", rollout {kind}" if kind else ""


def _steps(recipe: Block, summary: Block) -> str:
    steps, done = recipe.get("steps"), summary.get("steps")
    batch = _block(recipe.get("batch"))
    prompts, group = batch.get("prompts"), batch.get("group") or 1
    told = str(done if done is not None else steps or "")
    if done is not None and done != steps and steps:
        told += f" of {steps}"
    if told and isinstance(prompts, int) and isinstance(group, int):
        each = f"{prompts} prompts" + (f", {group} answers each" if group > 1 else "")
        told += f", each of {each}"
    return told


def _time(summary: Block) -> str:
    seconds = number(summary.get("seconds"))
    if seconds is None:
        return ""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory(summary: Block) -> str:
    memory = number(summary.get("peak_memory_bytes"))
    return "" if memory is None else f"{memory / 2**30:.2f} GiB"


def _end(summary: Block) -> str:
    if summary.get("ended_by"):
        return str(summary["ended_by"])
    return "stopped early" if summary.get("stopped_early") else ""


def _spent(privacy: object) -> str:
    """What a private run spent, in a line."""
    if not isinstance(privacy, Mapping):
        return ""
    epsilon, delta = (number(privacy.get(name)) for name in ("epsilon", "delta"))
    if epsilon is None or delta is None:
        return "none: some step had no noise"
    known = "; its seeds are known" if privacy.get("seed_known") is True else ""
    parts = privacy.get("spent")
    # Steps before a change of settings had another noise than the settings say now.
    taken = [part for part in (parts if isinstance(parts, list) else [privacy]) if isinstance(part, Mapping)]
    steps = " and ".join(
        f"{part.get('steps')} steps with noise {number(part.get('noise_multiplier')) or 0:.4g}" for part in taken
    )
    return f"epsilon {epsilon:.3g} at delta {delta:.3g} ({privacy.get('accountant')}), {steps or 'no step'}{known}"


def _promised(summary: Block) -> str:
    """The models of private runs that it learnt from: their epsilons add to its own for records of both."""
    try:
        return " and ".join(map(str, promises.listed(summary)))
    except (TypeError, ValueError, AttributeError):
        return ""


def _public(value: object) -> Any:
    """A block in which a model's folder on this machine has its name alone: a card is shown to others."""
    if isinstance(value, Mapping):
        return {key: _place(one) if key == "model" else _public(one) for key, one in value.items()}
    return value


def _place(model: object) -> object:
    local = isinstance(model, str) and model.startswith(("/", "./", "../", "~"))
    return Path(str(model)).name or model if local else _public(model)


def _count(value: object) -> str:
    """A whole number as people say it: 134.5 M."""
    if not isinstance(value, int):
        return str(value)
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if value >= size:
            return f"{value / size:.{max(0, 2 - int(math.log10(value / size)))}f} {unit}"
    return f"{value:,}"


def _of(block: object, *keys: str) -> str:
    for key in keys:
        if isinstance(block, Mapping) and block.get(key) not in (None, ""):
            value = block[key]
            return _of(value, "kind") if isinstance(value, Mapping) else str(value)
    return "" if isinstance(block, Mapping) else str(block or "")


def _block(value: object) -> Block:
    return value if isinstance(value, Mapping) else {}


def _blocks(value: object) -> list[Block]:
    found = value if isinstance(value, list) else [value] if value else []
    return [one if isinstance(one, Mapping) else {"kind": str(one), "model": str(one)} for one in found]
