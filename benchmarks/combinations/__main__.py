"""Try every pair of choices and write the results and their page: `python -m benchmarks.combinations`.

With `--only` some kinds of student alone, whose results take the place of those that the file has. Ends with an error
where a pair goes wrong. `python -m benchmarks.pages` writes the page again from the file.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import pages
from benchmarks.alternation import silence, versions_and_machine
from benchmarks.combinations.page import generated
from benchmarks.combinations.table import FILE, Found, load, measured, save
from benchmarks.combinations.tasks import tasks
from benchmarks.combinations.trying import Trials

ORDER = ("causal_lm", "image_text", "draft", "flow_transformer", "action_tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, help="kinds of student")
    parser.add_argument("--json", type=Path, default=FILE, help="where the results are")
    arguments = parser.parse_args()
    silence()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    wrong: list[str] = []

    def told(found: Found) -> None:
        if found.verdict in ("broken", "alone"):
            wrong.append(f"{found.a} x {found.b}: {found.verdict}: {found.reason}")
            print(wrong[-1], flush=True)

    earlier = load(arguments.json)[0] if arguments.json.is_file() else []
    results = {result.task: result for result in earlier}
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder, tasks(Path(folder), arguments.only) as made:
        for task in made:
            since, trials = time.process_time(), Trials()
            results[task.name] = measured(task, trials, told)
            count = len(results[task.name].pairs)
            seconds = time.process_time() - since
            print(f"{task.name}: {count} pairs, {len(trials.known)} recipes, {seconds:.0f} CPU seconds", flush=True)
    facts = {"cpu_seconds": round(time.process_time() - begun), **versions_and_machine()}
    save([results[name] for name in ORDER if name in results], facts, arguments.json)
    if arguments.json == FILE:
        pages.write(pages.ROOT / "docs/combinations.md", generated(load()[0]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
