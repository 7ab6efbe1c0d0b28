"""Where Uni-OPD's arms are right: test accuracy by the difficulty of the problem, from the committed results.

python -m reproductions.uni_opd_levels
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.prompts import load_prompts
from opd.recipe import parse_recipe
from reproductions.uni_opd_models import TASKS, both, recipe

RESULTS = Path(__file__).with_name("uni-opd") / "results.json"
SIZE = 300


def levels() -> dict[str, tuple[str, int]]:
    """Task and difficulty of each test problem by its id."""
    asked = load_prompts(parse_recipe(recipe("none", 1, 0.0, prompts=both(SIZE, "test"), objective=["sft"])).prompts)
    return {prompt.id: (prompt.fields["task"], prompt.fields["difficulty"]) for prompt in asked}


def main() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    of = levels()
    columns = sorted(set(of.values()), key=lambda pair: (list(TASKS).index(pair[0]), pair[1]))
    counts = [sum(value == column for value in of.values()) for column in columns]
    print("arm".ljust(20), *(f"{task} {level} ({n})" for (task, level), n in zip(columns, counts, strict=True)))
    for arm, of_seeds in results["items"]["test_accuracy"].items():
        means = []
        for column in columns:
            own = [value for verdicts in of_seeds for name, value in verdicts.items() if of[name] == column]
            means.append(sum(own) / len(own))
        print(arm.ljust(20), *(f"{value:.3f}".rjust(8) for value in means))


if __name__ == "__main__":
    main()
