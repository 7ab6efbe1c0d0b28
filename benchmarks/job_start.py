"""What it costs to start a job of a reproduction: our fork server against that of `multiprocessing`, same jobs.

`python -m benchmarks.job_start --jobs 8` prints for each, and for fresh processes, the wall seconds of a first job and
of each further one. Jobs do nothing; both servers have imported the same modules.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from opd.reproductions.fork_server import MODULES, ONE_THREAD, fork_server
from opd.reproductions.worker import run

Times = list[float]


def nothing(folder: Path, inputs: dict[str, Path]) -> dict[str, float]:
    """The job: a figure."""
    import opd.api  # noqa: F401  # what nearly every job imports

    return {"figure": 0.0}


def begin(folder: Path) -> None:
    """In the standard library's process of a job; its parent is the server."""
    run(folder, os.getppid())


def folders(into: Path, count: int) -> list[Path]:
    task = {
        "name": "nothing",
        "function": "benchmarks.job_start:nothing",
        "version": 1,
        "params": {},
        "inputs": {},
        "reproductions": str(Path(__file__).parent.parent / "reproductions"),
    }
    made = [into / f"job-{i}" for i in range(count)]
    for folder in made:
        folder.mkdir()
        (folder / "task.json").write_text(json.dumps(task))
    return made


def one_after_the_other(made: list[Path], start: Callable[[Path], None]) -> Times:
    """Wall seconds of each job, from its start to its end."""
    taken = []
    for folder in made:
        began = time.perf_counter()
        start(folder)
        taken.append(time.perf_counter() - began)
        assert (folder / "job.json").is_file(), (folder / "output.txt").read_text()
    return taken


def ours(into: Path, count: int) -> Times:
    made = folders(into, count)
    with (into / "lock").open("w") as lock, fork_server(into / "log", lock.fileno(), MODULES) as server:

        def start(folder: Path) -> None:
            server.send(str(folder))
            server.recv()

        return one_after_the_other(made, start)


def standard(into: Path, count: int, method: str) -> Times:
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(MODULES))

    def start(folder: Path) -> None:
        process = context.Process(target=begin, args=(folder,))  # type: ignore[attr-defined]  # any context has it
        process.start()
        process.join()

    return one_after_the_other(folders(into, count), start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=8)
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD)
    ways: dict[str, Callable[[Path], Times]] = {
        "opd.reproductions.fork_server": lambda into: ours(into, arguments.jobs),
        "multiprocessing forkserver": lambda into: standard(into, arguments.jobs, "forkserver"),
        "fresh processes (spawn)": lambda into: standard(into, arguments.jobs, "spawn"),
    }
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as into:
            first, *rest = way(Path(into))
        rest.sort()
        print(f"{name}: first job {first:.2f} s, then {rest[len(rest) // 2]:.2f} s ({rest[0]:.2f} to {rest[-1]:.2f})")


if __name__ == "__main__":
    main()
