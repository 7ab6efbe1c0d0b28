"""The process of one job, whose folder holds its task.json."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from opd.errors import OpdError


def run(folder: Path, parent: int) -> None:
    """All that the process of a job does, which `parent` started. What it prints goes to output.txt."""
    end_with(parent)
    with (folder / "output.txt").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # Runs record their command.
    sys.argv = [__file__, str(folder)]
    # A fork has its parent's state of these generators; Python draws its own.
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.seed()
    try:
        work(folder)
    except OpdError as error:
        sys.exit(f"{error}")


def work(folder: Path) -> None:
    """Call the task's function; job.json appears whole and last, so a folder without it is unfinished."""
    from opd.files.whole import write_whole
    from opd.provenance import git_state, versions
    from opd.reproductions.catalogue import open_folder
    from opd.reproductions.jobs import source_of

    task: dict[str, Any] = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    open_folder(Path(task["reproductions"]))
    module, _, name = task["function"].partition(":")
    started = time.perf_counter()
    inputs = {name: folder.parent / key for name, key in task["inputs"].items()}
    figures = getattr(importlib.import_module(module), name)(folder, inputs, **task["params"])
    record = {
        **{key: task[key] for key in ("name", "function", "version", "params", "inputs")},
        "figures": figures,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "versions": versions(),
        "git": git_state(),
        "source": source_of(task["function"]),
    }
    write_whole(folder / "job.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def end_with(parent: int) -> None:
    """A worker whose parent was killed ends too: nobody would take in its result, or stop it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
