"""What a run must record to be repeated: versions, machine, seeds, git state."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.errors import ModelError
from opd.files.ours import FILLING, LIST, entries
from opd.files.places import DIRECTORY

PACKAGES = ("opd", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and whether the tree was changed, of the working directory; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def environment(seed: int) -> dict[str, Any]:
    """Everything of the above for one run; holds no environment variable, so no secret."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "git": git_state(),
        "command": sys.argv,
        DIRECTORY: os.getcwd(),
    }


def size_of(part: object) -> dict[str, Any]:
    """What tells one model from another at a glance, of a built student or teacher: `family`, `layers`, `width`,
    `vocabulary` and `parameters`, as far as it has a model in this process that says so."""
    held: Any = getattr(part, "language", None) or getattr(part, "module", None)
    module: Any = getattr(held, "base", held)
    if not hasattr(module, "parameters"):
        return {}
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = {"layers": "num_hidden_layers", "width": "hidden_size", "vocabulary": "vocab_size"}
    found = {ours: getattr(text, theirs, None) for ours, theirs in names.items()}
    facts = {"family": getattr(config, "model_type", None), **found}
    known = {name: value for name, value in facts.items() if isinstance(value, int | str)}
    return known | {"parameters": sum(parameter.numel() for parameter in module.parameters())}


ORIGIN = LIST
"""Beside a saved student's weights: where it comes from, and which files of its folder `opd` wrote."""


def write_origin(folder: Path, **facts: object) -> None:
    """Complete a folder of a model that is just being written: `facts`, and the list of what lies in it."""
    files = sorted(name for name in entries(folder) if name != FILLING)
    text = json.dumps({"format": 1, **facts, "files": files}, indent=2) + "\n"
    (folder / ORIGIN).write_text(text, encoding="utf-8")


def read_origin(folder: Path) -> dict[str, Any]:
    """What the run that saved a student says of it; empty for a model from elsewhere.

    `teachers`: hashes of the teachers that the last run which had any learnt from.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found["teachers"], list)
        return dict(found)
    except (ValueError, TypeError, KeyError, AssertionError):
        raise ModelError(f"{path} does not list a student's teachers as opd writes it; mend or remove it") from None


def student_of(student: object) -> str:
    """What a student's block of a recipe names, for people: its model, or that which a new drafter is for."""
    if isinstance(student, dict) and "target" in student and not student.get("model"):
        return f"a drafter of {models_of(student['target'])}"
    return models_of(student)


def models_of(teacher: object) -> str:
    """What a teacher's block of a recipe names, for people: its model, those of its routes, or its kind."""
    if not isinstance(teacher, dict):
        return str(teacher or "")
    routes = teacher.get("routes")
    if isinstance(routes, dict):
        return ", ".join(f"{models_of(route)} for {tag}" for tag, route in routes.items())
    return str(teacher.get("model") or teacher.get("kind") or "")


def held_out_told(summary: Mapping[str, Any]) -> str:
    """Of how many prompts a run's held-out figures are, and of how many of them those of the teacher, where it did not
    answer about all."""
    told, compared = f"{summary['held_out_prompts']} prompts held out", summary.get("compared")
    if not compared:
        return told
    told += f"; the teacher's figures are of {compared['before']} before and {compared['after']} after"
    same = f", of which {compared['both']} are the same: they compare different prompts"
    return told + (same if different_prompts(summary) else "")


def different_prompts(summary: Mapping[str, Any]) -> bool:
    """Whether a run's teacher answered about other held-out prompts before training than after it."""
    return len(set((summary.get("compared") or {}).values())) > 1


def peak_memory_bytes() -> int:
    """Peak allocated bytes on the CUDA device, or the peak resident set of this process without one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _peak_resident()


def _peak_resident() -> int:
    """Bytes. Of Linux its `VmHWM`: what `getrusage` says of a process begins with what the one that started it held."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
