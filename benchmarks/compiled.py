"""Does `torch.compile` pay on a CPU? `python -m benchmarks.compiled [--quick] --json PATH`.

The student of the size `smollm2` with its layers compiled for sequences of any length, against the same student as it
is: a packed forward pass without a gradient, and one with its backward pass, of a step's completions. Both take turns
in one process of one thread. Compiling is reported beside it: everything up to the first answers.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.alternation import silence, versions_and_machine, write
from benchmarks.sizes import SIZES, materialise
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings

REPEATS = 7
PASSES = {"forward": False, "forward and backward": True}


def student(layers: int | None) -> LanguageModel:
    """`smollm2`'s student, of its first `layers` layers."""
    folder = materialise(SIZES["smollm2"]) / "student"
    model = LanguageModel.load(ModelSettings(model=str(folder), dtype="float32", template="plain"), "cpu")
    body = model.base.get_decoder()
    body.layers = body.layers[:layers]
    return model.eval()


def once(model: LanguageModel, lengths: list[int], backward: bool) -> tuple[float, torch.Tensor]:
    """CPU seconds of a pass over completions of `lengths` after short prompts, and its hidden states."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(100, 40000, (n,), generator=generator) for n in lengths]
    start = time.process_time()
    with torch.set_grad_enabled(backward):
        hidden = model([row[:16] for row in rows], rows, "packed")
    if backward:
        hidden.square().mean().backward()
        model.zero_grad()
    return time.process_time() - start, hidden.detach()


def measure(quick: bool) -> dict[str, Any]:
    """Seconds of both sides, by pass, and how far hidden states are apart."""
    size = SIZES["smollm2"]
    lengths = [8, 24] if quick else size.lengths(1)
    layers = 2 if quick else None
    own, compiled = student(layers), student(layers)
    for layer in compiled.base.get_decoder().layers:
        layer.compile(dynamic=True)
    start = time.perf_counter(), time.process_time()
    for backward in PASSES.values():
        once(compiled, [n + 1 for n in lengths], backward)
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    seconds: dict[str, dict[str, list[float]]] = {name: {"as it is": [], "compiled": []} for name in PASSES}
    apart = 0.0
    for repeat in range(1 + (2 if quick else REPEATS)):
        for name, backward in PASSES.items():
            answers = {}
            for side, model in (("as it is", own), ("compiled", compiled)):
                taken, answers[side] = once(model, lengths, backward)
                if repeat:  # the first one warms up
                    seconds[name][side].append(taken)
            apart = max(apart, float((answers["compiled"] - answers["as it is"]).abs().max()))
    return {
        "lengths": lengths,
        "layers": len(own.base.get_decoder().layers),
        "compiling_wall_seconds": spent[0],
        "compiling_cpu_seconds": spent[1],
        "seconds": seconds,
        "apart": apart,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers, two short completions, two repeats")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    command = shlex.join(["python", "-m", "benchmarks.compiled", *sys.argv[1:]])
    report = {"command": command, **versions_and_machine(), **measure(options.quick), "goals": []}
    write(options.json, report)
    table = Table(title=f"compiled in {report['compiling_wall_seconds']:.0f} s; CPU seconds")
    for column in ("", "as it is", "compiled"):
        table.add_column(column)
    for name, sides in report["seconds"].items():
        table.add_row(name, *(f"{statistics.median(values):.3f}" for values in sides.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
