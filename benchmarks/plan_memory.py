"""Is the memory that `opd check` estimates for the quickstart the memory that it takes?

`python -m benchmarks.plan_memory [--json PATH]` runs two steps of the quickstart in a process of its own and compares.
Goal: within 25 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

GOAL = 0.25


def command(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "opd", *words], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    estimate = json.loads(command("check", "quickstart", "--json"))["peak_memory_bytes"]
    with tempfile.TemporaryDirectory() as folder:
        run = f"output={folder}/run"
        command("train", "quickstart", run, "steps=2", "evaluation.held_out=2", "--quiet")
        measured = json.loads((Path(folder) / "run" / "summary.json").read_text())["peak_memory_bytes"]
    off = estimate / measured - 1
    if arguments.json:
        result = {"command": "python -m benchmarks.plan_memory", "estimate": estimate, "measured": measured, "off": off}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"plan_memory: estimate {estimate / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB, off by {off:+.0%} "
        f"(goal: within {GOAL:.0%}): {'met' if abs(off) <= GOAL else 'MISSED'}"
    )
    return 0 if abs(off) <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
