"""Is what `opd check` estimates what a run takes?

`python -m benchmarks.plan_memory [--recipes NAME ...] [--json PATH]` runs two steps of every recipe in the package that
runs here by itself, each in a process of its own, and compares memory at its peak with what was estimated, and the
second step's seconds. Goal: memory within 25 %. Seconds are estimated at most, as if every completion had its whole
length, and from what the machine could do while it was asked; so they are told without a goal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.loss_operator import describe_machine, versions

GOAL = 0.25
RECIPES = ("quickstart", "heal", "chain_1_sft", "smollm2_uni_1_student", "tool_machine_smollm2", "textworld_smollm2")
"""Those whose models come with a package and that no other recipe has to be run before."""


def command(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "opd", *words], capture_output=True, text=True, check=True).stdout


def compared(name: str) -> dict[str, float]:
    """Estimates and what two steps took, of one recipe; held-out prompts are few."""
    shorter = ["steps=2"]
    plan = json.loads(command("check", name, *shorter, "--json"))
    if "evaluation" in (text := command("recipes", name)) and "held_out" in text:
        shorter.append("evaluation.held_out=2")
    with tempfile.TemporaryDirectory() as folder:
        command("train", name, f"output={folder}/run", *shorter, "--quiet")
        measured = json.loads((Path(folder) / "run" / "summary.json").read_text())["peak_memory_bytes"]
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row["train/seconds/step"] for row in map(json.loads, lines) if "train/seconds/step" in row]
    estimate = plan["peak_memory_bytes"]
    seconds = sum(plan["estimate"]["here"].get("seconds_per_step", {}).values())
    return {
        "estimate": estimate,
        "measured": measured,
        "off": estimate / measured - 1,
        "seconds_estimate": seconds,
        "seconds_measured": steps[-1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {}
    for name in arguments.recipes:
        each = found[name] = compared(name)
        print(
            f"{name}: estimate {each['estimate'] / 2**30:.2f} GiB, measured {each['measured'] / 2**30:.2f} GiB, off by "
            f"{each['off']:+.0%} (goal: within {GOAL:.0%}): {'met' if abs(each['off']) <= GOAL else 'MISSED'}; a step "
            f"{each['seconds_estimate']:.1f} s at most, measured {each['seconds_measured']:.1f} s",
            flush=True,
        )
        if arguments.json:
            result = {
                "command": "python -m benchmarks.plan_memory",
                "machine": describe_machine("cpu"),
                "versions": versions(),
                "recipes": found,
            }
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(abs(each["off"]) <= GOAL for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
