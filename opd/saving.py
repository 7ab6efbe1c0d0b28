"""The end of a run: its student, summary and report on the disk, and the student on the hub."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from opd.errors import RESUME, RunError
from opd.files.ours import foreign
from opd.files.whole import attempt, told, whole_folder, write_whole
from opd.hub import push
from opd.model_card import model_card
from opd.privacy import promises
from opd.provenance import ORIGIN, write_origin
from opd.report import write_report
from opd.run import Monitoring, Run


def save_run(run: Run, summary: dict[str, Any]) -> str | None:
    """Write the student, the summary and the report; what is lacking beside the weights is a warning and stands in the
    summary. Returns how the saved student differs from the trained one."""
    monitor, recipe = run.monitor, run.recipe
    target = recipe.directory / "student"
    promised = promises.written([*promises.own(recipe.name, summary.get("privacy")), *promises.listed(summary)])
    card = model_card(recipe, summary, run.student.library)
    try:
        _set_aside(target, monitor)
        with whole_folder(target) as folder:
            problems = run.student.save(folder, card)
            problems += attempt(ORIGIN, lambda: write_origin(folder, teachers=origin(run), **promised))
    except (OSError, SafetensorError) as error:
        raise RunError(f"the student cannot be saved to {target} ({error}); {_rescued(run, card)}") from None
    for problem in problems:
        monitor.warn(f"{problem}; the weights are in {target}")
    try:
        different = run.student.compare(target)
    except Exception as error:
        different = f"{target} could not be compared with the trained model ({told(error)})"
    problems += _save_beside(run)
    lacking = [*problems, *([] if different is None else [different])]
    facts = summary | ({"lacking": lacking} if lacking else {})
    try:
        write_whole(recipe.directory / "summary.json", json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"the student is in {target}, and summary.json cannot be written ({error})") from None
    try:
        write_report([recipe.directory], recipe.directory / "report.html")
    except (OSError, RunError) as error:
        monitor.warn(f"the report cannot be written ({told(error)}); opd report {recipe.directory} makes it again")
    if recipe.push_to is not None and different is None:
        failed = push(target, recipe.push_to)
        if failed is not None:
            monitor.warn(failed)
    return different


def _save_beside(run: Run) -> list[str]:
    """Write what was trained beside the student, each in its folder of the run; what went wrong, which is warned of."""
    problems = []
    for name, write in run.rollout.beside().items():
        target = run.recipe.directory / name
        try:
            _set_aside(target, run.monitor)
            with whole_folder(target) as folder:
                write(folder)
        except (OSError, SafetensorError) as error:
            problems.append(f"{target} cannot be written ({told(error)})")
            run.monitor.warn(problems[-1])
    return problems


def _rescued(run: Run, card: str) -> str:
    """What is left of a student that cannot be saved in its place: the checkpoint, or a copy where there is room."""
    if run.checkpoints.written == run.step:
        return f"free some space and go on with {RESUME}"
    place = Path(tempfile.mkdtemp(prefix="opd-student-"))
    try:
        run.student.save(place, card)
        return f"it is in {place} instead: there is no checkpoint to go on from"
    except (OSError, SafetensorError):
        shutil.rmtree(place, ignore_errors=True)
        return "there is no checkpoint to go on from; set checkpoint.every"


def _set_aside(target: Path, monitor: Monitoring) -> None:
    """Keep what somebody has put into an earlier student, or in the way of the new one, under another name."""
    for folder in (target, *(target.with_name(f".{target.name}.{end}") for end in ("partial", "old"))):
        if foreign(folder):
            names = (target.with_name(f"{target.name}.kept-{i}") for i in itertools.count(1))
            kept = next(path for path in names if not (path.exists() or path.is_symlink()))
            folder.rename(kept)
            monitor.warn(f"{folder} held files that opd did not write; it is now {kept}")


def origin(run: Run) -> list[str]:
    """Where a saved student comes from: the hashes of the teachers that it learnt from, or, when this run had none,
    those of the run before."""
    teachers = [member.identity() for teacher in run.teachers for member in teacher.members().values()]
    found = sorted({*run.rollout.teachers(), *(name for name in teachers if name is not None)})
    before = getattr(run.student, "origin", {})
    return found or list(before.get("teachers", []))
