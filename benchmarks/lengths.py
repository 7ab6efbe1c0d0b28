"""What unequal lengths cost on a device: `python -m benchmarks.lengths [--device cuda] [--size qwen3] --json PATH`.

`layouts`: one pass of a step's rows padded, against one row without padding; without a gradient, and with the backward
pass. By flash attention where it is installed, else by `sdpa`, whose mask of all tokens by all tokens is then part of
the cost; the report says which. `looks`: a rollout whose sampler asks at every token which rows have ended, against one
that asks every few. Both sides of each take turns on one model of random weights in bfloat16, with the device awaited
at every end. A part that cannot be measured stands in the report with the reason.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.alternation import silence, versions_and_machine, write
from benchmarks.phases import synchronise
from benchmarks.sizes import ON_DEVICE, Size, load, materialise
from opd.language.attention import attention_of, installed
from opd.language.engines.layouts import Layout, can_flatten
from opd.language.engines.padding import pad
from opd.language.engines.sampler import LOOK_EVERY, Sampler
from opd.language.engines.transformers import LanguageModel

FLASH = "flash_attention_2"
LAYOUTS: dict[str, Layout] = {"padded": "right", "without padding": "varlen"}
LOOKS = {"every token": 1, f"every {LOOK_EVERY}": LOOK_EVERY}
MOST_DRAWN = 256


def language_of(size: Size, device: str, flash: bool) -> LanguageModel:
    """The student of random weights, by flash attention or by sdpa."""
    materialise(size)
    model = load(size, "student", torch.bfloat16, device)
    model.set_attn_implementation(FLASH if flash else "sdpa")
    return LanguageModel(model, AutoTokenizer.from_pretrained(size.folder / "student"), "plain").eval()


def rows_of(size: Size) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random prompts and completions of one pass, of the lengths that the size has."""
    generator = torch.Generator().manual_seed(0)
    lengths = size.lengths(1)[: size.micro]
    prompts = torch.randint(*size.prompt, (len(lengths),), generator=generator).tolist()

    def random(of: list[int]) -> list[torch.Tensor]:
        return [torch.randint(3, size.vocabulary, (n,), generator=generator) for n in of]

    return random(prompts), random(lengths)


def timed(device: str, work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Wall seconds with the device awaited, and what came out."""
    synchronise(device)
    start = time.perf_counter()
    found = work()
    synchronise(device)
    return time.perf_counter() - start, found


def layouts(language: LanguageModel, size: Size, device: str, repeats: int) -> dict[str, Any]:
    """Seconds of both layouts, and how far their log-probabilities of the same tokens are apart on average."""
    if not can_flatten(language.base):
        return {"skipped": f"{language.family} is padded always"}
    prompts, completions = rows_of(size)
    fed = pad([torch.cat([x, y[:-1]]) for x, y in zip(prompts, completions, strict=True)], "right")[1]
    tokens = torch.cat(completions).to(device)
    language.model.gradient_checkpointing_enable({"use_reentrant": False})
    seconds: dict[str, dict[str, list[float]]] = {
        name: {side: [] for side in LAYOUTS} for name in ("forward", "forward and backward")
    }
    said = {}
    for repeat in range(repeats + 1):
        for name, of_sides in seconds.items():
            backward = name != "forward"
            language.train(backward)
            for side, layout in LAYOUTS.items():

                def work(layout: Layout = layout, backward: bool = backward) -> torch.Tensor:
                    with torch.set_grad_enabled(backward):
                        hidden = language(prompts, completions, layout)
                    if backward:
                        hidden.float().square().mean().backward()
                        language.zero_grad()
                    return hidden.detach()

                spent, hidden = timed(device, work)
                if repeat:  # the first one warms up
                    of_sides[side].append(spent)
                elif not backward:
                    with torch.no_grad():
                        parts = zip(hidden.split(1024), tokens.split(1024), strict=True)
                        said[side] = torch.cat(
                            [language.head(1.0).logits(h).log_softmax(-1).gather(1, y[:, None]) for h, y in parts]
                        )
    return {
        "attention": attention_of(language.base),
        "rows": [len(x) + len(y) - 1 for x, y in zip(prompts, completions, strict=True)],
        "padding": 1 - float(fed.float().mean()),
        "seconds": seconds,
        "apart": float((said["padded"] - said["without padding"]).abs().mean()),
    }


def looks(language: LanguageModel, size: Size, device: str, repeats: int) -> dict[str, Any]:
    """Seconds of a rollout by both samplers, and the share of rows that are the same; kernels round otherwise in a
    batch of another size."""
    prompts = rows_of(size)[0] * max(1, size.batch // len(rows_of(size)[0]))
    budget = min(size.longest, MOST_DRAWN)
    # So many ids end a row that random weights end most of them before the budget.
    ends = list(range(3, size.vocabulary, max(1, budget // 3)))
    seconds: dict[str, list[float]] = {side: [] for side in LOOKS}
    rows: dict[str, list[list[int]]] = {}
    language.eval()
    for repeat in range(repeats + 1):
        for side, every in LOOKS.items():
            sampler = Sampler(language, language.head(1.0), ends)
            sampler.look_every = every

            def work(sampler: Sampler = sampler, side: str = side) -> torch.Tensor:
                state = sampler.extend(sampler.start(prompts, 1, budget, range(len(prompts))), budget)
                rows[side] = [actions.tolist() for actions, _, _ in state.rows()]
                return state.lengths

            spent, _ = timed(device, work)
            if repeat:
                seconds[side].append(spent)
    first, second = rows.values()
    return {
        "attention": attention_of(language.base),
        "rows": [len(row) for row in first],
        "seconds": seconds,
        "same": statistics.mean(a == b for a, b in zip(first, second, strict=True)),
    }


def measure(size: Size, device: str, repeats: int) -> dict[str, Any]:
    """Both parts; one that cannot run says why."""
    flash = device == "cuda" and installed(FLASH)
    found: dict[str, Any] = {}
    if not flash:
        found["note"] = "flash attention is not there: sdpa, which makes a mask of all tokens by all tokens"
    for part, of_flash in ((layouts, flash), (looks, False)):
        try:
            found[part.__name__] = part(language_of(size, device, of_flash), size, device, repeats)
        except (RuntimeError, ImportError, ValueError) as error:
            found[part.__name__] = {"skipped": (str(error).splitlines() or [type(error).__name__])[0][:200]}
    return found


def told(report: dict[str, Any]) -> list[str]:
    """What was found, a line for each part."""
    lines = []
    for part in ("layouts", "looks"):
        found = report.get(part, {"skipped": "no report"})
        if "skipped" in found:
            lines.append(f"{part} skipped: {found['skipped']}")
            continue
        passes = found["seconds"] if part == "layouts" else {"rollout": found["seconds"]}
        for name, sides in passes.items():
            shown = ", ".join(f"{side} {statistics.median(values):.3g} s" for side, values in sides.items())
            lines.append(f"{name} by {found['attention']}: {shown}")
    return lines


def main() -> int:
    """Measure, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(ON_DEVICE), default="qwen3-tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    silence()
    command = shlex.join(["python", "-m", "benchmarks.lengths", *sys.argv[1:]])
    measured = measure(ON_DEVICE[options.size], options.device, options.repeats)
    report = {"command": command, **versions_and_machine(options.device), **measured, "goals": []}
    write(options.json, report)
    print("; ".join(told(report)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
