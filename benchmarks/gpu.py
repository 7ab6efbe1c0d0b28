"""What `opd` does on a GPU, in one command and one file: `python -m benchmarks.gpu --json PATH` (`make gpu`).

Runs the tests marked `gpu`, the loss operator's benchmark, what unequal lengths cost, and steps of a Qwen3-8B-shaped
teacher with a Qwen3-1.7B-shaped student: random weights made on the device, bfloat16, completions of 1k to 4k tokens.
Nothing is loaded from a network. Each part is a command of its own; their figures stand in PATH under the device's
name. `--device cpu --shape tiny` runs the same code where there is no GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import lengths, peers
from benchmarks.alternation import versions_and_machine, write
from benchmarks.head_to_head import progress

SHAPES = {"qwen3": ["--size", "qwen3"], "tiny": ["--size", "qwen3-tiny", "--repeats", "1"]}
OPERATOR = {"qwen3": [], "tiny": ["--quick", "--vocabulary", "1024", "--repeats", "1"]}

PARTS = ("tests", "loss_operator", "lengths", "head_to_head")
TESTS = ("tests/test_gpu.py", "tests/test_benchmarks.py")


def run(module: str, arguments: list[str], where: Path) -> dict[str, Any]:
    """A benchmark's report and exit status; a run that left no report says so."""
    path = where / f"{module.split('.')[-1]}.json"
    command = [sys.executable, "-m", module, *arguments, "--json", str(path)]
    progress(shlex.join(["python", *command[1:]]))
    status = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": []}
    return {**report, "exit_status": status}


def tests() -> dict[str, Any]:
    """Counts of the tests marked `gpu`."""
    progress("tests marked gpu")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=peers.ROOT, check=False)
    print(done.stdout, file=sys.stderr)
    return {"exit_status": done.returncode, "summary": done.stdout.strip().splitlines()[-1] if done.stdout else ""}


def last_line(report: dict[str, Any]) -> str:
    """What was found, in one line."""
    parts = [f"tests: {report['tests']['summary']}"]
    for cell in report["head_to_head"]["cells"]:
        of = next(iter(cell["threads"].values()))["opd"]
        gigabytes = cell["memory"]["opd"]["peak_bytes"] / 1e9
        parts.append(
            f"{cell['size']['name']} step: {of['wall_seconds']:.3g} s, {gigabytes:.3g} GB, "
            f"{cell['utilisation']['step']:.0%} of the matrix throughput"
        )
    parts += lengths.told(report["lengths"])
    failed = [name for name in PARTS if report[name]["exit_status"]]
    return f"gpu ({report['device']}): {'; '.join(parts)}; " + (f"FAILED: {', '.join(failed)}" if failed else "done")


def main() -> int:
    """Measure, report, and answer 1 when a part failed or missed its goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --device cpu --shape tiny runs the same code")
    if options.device == "cpu" and options.shape != "tiny":
        parser.error("--device cpu takes --shape tiny")
    device = ["--device", options.device]
    # Peers are compared where their environment is already there: nothing is installed here.
    operator = [*device, *OPERATOR[options.shape]] + ([] if _peers_here(options.device) else ["--no-peers"])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as where:
        report: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            **versions_and_machine(options.device),
            "tests": tests(),
            "loss_operator": run("benchmarks.loss_operator", operator, Path(where)),
            "lengths": run("benchmarks.lengths", [*device, *SHAPES[options.shape]], Path(where)),
            "head_to_head": run("benchmarks.head_to_head", [*device, *SHAPES[options.shape]], Path(where)),
        }
    write(options.json, report)
    print(last_line(report), flush=True)
    return int(any(report[name]["exit_status"] for name in PARTS))


def _peers_here(device: str) -> bool:
    return device == "cuda" and peers.present()


if __name__ == "__main__":
    sys.exit(main())
