"""A reproduction that only computes numbers, in a folder of its own, and its runs, for tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from opd.reproductions.catalogue import find
from opd.reproductions.reproduce import reproduce

ROOT = Path(__file__).parent.parent

TOY = '''
"""A toy: arms that only compute numbers, and stages that can be made to fail, die or wait from outside."""
import os, signal, time
from pathlib import Path
from opd.reproductions import Claim, Gate, Reproduction, Smoke, Stage

def made(folder, inputs, *, size):
    (folder / "data").write_text("x" * size)
    (folder / "half").write_text("unfinished")
    if Path("die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if Path("wait").exists():
        Path("pid").write_text(str(os.getpid()))
        time.sleep(60)
    return {"size": size}

def arm(folder, inputs, *, gain, seed):
    if Path(f"fail-{seed}").exists():
        raise ValueError("no luck today")
    score = len((inputs["data"] / "data").read_text()) + seed + gain
    costs = {"cpu_seconds": 1.5, "sampled_tokens": 10, "teacher_tokens": 20}
    curve = [{"step": step, **costs, "score": step * score} for step in (0, 1)]
    return {"score": score, **costs, "curve": curve, "items": {}}

reproduction = Reproduction(
    title="A toy", introduction="What is tested.", discussion="## Why\\n\\nIt adds up.",
    stages={"data": Stage(made, {"size": 5})},
    gates=[Gate("data", "size", at_least=5)],
    arms={"more": Stage(arm, {"gain": 2}, ["data"]), "less": Stage(arm, {"gain": 0}, ["data"])},
    seeds=[0, 1, 2],
    metrics=["score"],
    claims=[
        Claim("main", "More is more.", "score", "higher", "more", "less"),
        Claim("same", "More is the same.", "score", "higher", "more", "less", "equivalent", 1.0),
        Claim("large", "Also at a large size.", testable=False, note="No large machine."),
    ],
    smoke=Smoke(stages={"data": {"size": 1}}),
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with the toy's file, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # A file that a test writes twice within a second would be found compiled.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "reproductions").mkdir()
    path = tmp_path / "reproductions" / "toy_one.py"
    path.write_text(TOY)
    return path


def run(path, **options):
    return reproduce(find(str(path)), console=Console(quiet=True), **options)


def finished(path):
    return {file.parent.name: file.stat().st_mtime_ns for file in find(str(path)).cache.glob("*/job.json")}


def cli(*words):
    """Exit code, stdout and stderr of the real entry point in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "opd", "reproduce", *words], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def run_anew(path):
    sys.modules.pop(f"reproductions.{path.stem}", None)
    return run(path)
