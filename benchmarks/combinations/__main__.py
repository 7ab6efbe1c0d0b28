"""Try every pair of choices and write the results and their page: `python -m benchmarks.combinations`.

What the file of results has already is not tried again, so that a new choice costs its own pairs alone; after a change
of what recipes do, `--again`. Ends with an error where a pair goes wrong. `python -m benchmarks.pages` writes the page
from the file.
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
from benchmarks.combinations.table import FILE, GOOD, Found, Result, load, measured, save
from benchmarks.combinations.tasks import tasks
from benchmarks.combinations.trying import Trials

ORDER = ("causal_lm", "image_text", "draft", "flow_transformer", "action_tokens")
EVERY = 100
"""Results between two times that they are written."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, help="kinds of student")
    parser.add_argument("--again", action="store_true", help="try also what the file has results of")
    parser.add_argument("--json", type=Path, default=FILE, help="where the results are")
    arguments = parser.parse_args()
    silence()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results, facts = load(arguments.json) if arguments.json.is_file() else ([], {})
    known = {result.task: result for result in results}
    begun, tried = time.process_time(), 0

    def write() -> None:
        save([known[name] for name in ORDER if name in known], facts, arguments.json)

    def told(result: Result, found: Found) -> None:
        nonlocal tried
        tried += 1
        known[result.task] = result
        if found.verdict not in GOOD:
            print(f"{result.task}: {found.a} x {found.b}: {found.verdict}: {found.reason}", flush=True)
        if tried % EVERY == 0:
            write()

    with tempfile.TemporaryDirectory() as folder, tasks(Path(folder), arguments.only) as made:
        for task in made:
            since, trials = time.process_time(), Trials()
            earlier = None if arguments.again else known.get(task.name)
            known[task.name] = measured(task, trials, earlier, told)
            seconds = time.process_time() - since
            print(f"{task.name}: {len(trials.known)} recipes tried, {seconds:.0f} CPU seconds", flush=True)
    if tried:
        facts = {"cpu_seconds": round(time.process_time() - begun), "tried": tried, **versions_and_machine()}
    write()
    if arguments.json == FILE:
        pages.write(pages.ROOT / "docs/combinations.md", generated(load()[0]))
    wrong = [f for r in known.values() for f in (*r.singles, *r.pairs) if f.verdict not in GOOD]
    print(f"{len(wrong)} go wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
