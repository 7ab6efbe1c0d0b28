"""How busy the arithmetic is: operations of a step's matrix products, and what the machine was measured to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.phases import synchronise
from benchmarks.sizes import Size


def products(size: Size, step: int) -> dict[str, float]:
    """Operations (multiplications and additions) of the matrix products in each phase of one step without padding,
    attention included. What a step computes twice to save memory counts once."""
    tokenizer = AutoTokenizer.from_pretrained(size.folder / "student")
    here = slice(step * size.batch, (step + 1) * size.batch)
    prompts = [len(tokenizer(text)["input_ids"]) for text in size.prompts(step + 1)[here] for _ in range(size.group)]
    lengths = [n for n in size.lengths(step + 1)[here] for _ in range(size.group)]
    fed = [p + n - 1 for p, n in zip(prompts, lengths, strict=True)]
    student, teacher = (json.loads((size.folder / n / "config.json").read_text()) for n in ("student", "teacher"))
    own, answers = (sum(body(model, n) for n in fed) for model in (student, teacher))
    heads = [2.0 * size.vocabulary * model["hidden_size"] * sum(lengths) for model in (student, teacher)]
    return {
        "rollout": own + heads[0],
        "teacher": answers,
        "student": own,
        # The gradients of hidden states and head are two more products of the head's size.
        "loss": 3 * heads[0] + heads[1],
        "backward": 2 * own,
    }


def body(config: dict[str, Any], tokens: int) -> float:
    """Operations of one causal pass of a Llama or Qwen3 body over a sequence."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    attention = width * size * (2 * heads + 2 * config["num_key_value_heads"])
    weights = attention + 3 * width * config["intermediate_size"]
    seen = tokens * (tokens + 1) / 2
    return config["num_hidden_layers"] * (2.0 * weights * tokens + 4.0 * heads * size * seen)


def peak_throughput(dtype: torch.dtype, device: str = "cpu", seconds: float = 1.0) -> float:
    """Operations a second of a large matrix product, the best of many: CPU seconds of one thread, or a GPU's."""
    side, clock = (1024, time.process_time) if device == "cpu" else (8192, time.perf_counter)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    _seconds(a, b, device, clock)
    best, end = 0.0, time.perf_counter() + seconds
    # At least once, however slow the device is at it, and until the clock has shown a time.
    while best == 0.0 or time.perf_counter() < end:
        spent = _seconds(a, b, device, clock)
        best = max(best, 2.0 * side**3 / spent if spent else 0.0)
    return best


def _seconds(a: torch.Tensor, b: torch.Tensor, device: str, clock: Callable[[], float]) -> float:
    synchronise(device)
    start = clock()
    a @ b
    synchronise(device)
    return clock() - start
