"""Which file format should hold a store? `python -m benchmarks.store_formats [--json PATH] [--quick]`.

Rows of a store are read one at a time in random order. Each format holds the same rows of hidden states (bfloat16 as
16-bit integers, 512 tokens each, width 576) in shards of 64 rows: safetensors, an Arrow IPC file and Parquet without
compression, all memory-mapped where the format can be. Formats alternate; what is reported is the median round.
Goal: the chosen format, safetensors, reads within a tenth of the fastest or faster.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROWS, TOKENS, WIDTH = 64, 512, 576
GOAL = 0.9
Read = Callable[[int, int], torch.Tensor]


def safetensors(folder: Path, shards: list[torch.Tensor]) -> Read:
    """One tensor of all rows one after the other; a row is a slice."""
    for i, shard in enumerate(shards):
        save_file({"hidden": shard.view(-1, WIDTH)}, folder / f"{i}.safetensors")
    files = [safe_open(str(folder / f"{i}.safetensors"), framework="pt") for i in range(len(shards))]
    return lambda shard, row: files[shard].get_slice("hidden")[row * TOKENS : (row + 1) * TOKENS]


def arrow(folder: Path, shards: list[torch.Tensor]) -> Read:
    """A column of lists, one a row."""
    for i, shard in enumerate(shards):
        with pa.OSFile(str(folder / f"{i}.arrow"), "wb") as sink:
            made = table(shard)
            with pa.ipc.new_file(sink, made.schema) as writer:
                writer.write_table(made)
    tables = [pa.ipc.open_file(pa.memory_map(str(folder / f"{i}.arrow"))).read_all() for i in range(len(shards))]

    def read(shard: int, row: int) -> torch.Tensor:
        values = tables[shard].column("hidden").chunk(0)
        flat = values.flatten()
        start = row * TOKENS * WIDTH
        found = flat.slice(start, TOKENS * WIDTH).to_numpy(zero_copy_only=True)
        return torch.from_numpy(found.copy()).view(TOKENS, WIDTH)

    return read


def parquet(folder: Path, shards: list[torch.Tensor]) -> Read:
    """The same column, a row group for each row, so that one row can be read alone."""
    for i, shard in enumerate(shards):
        pq.write_table(
            table(shard), folder / f"{i}.parquet", row_group_size=1, compression="none", use_dictionary=False
        )
    files = [pq.ParquetFile(folder / f"{i}.parquet", memory_map=True) for i in range(len(shards))]

    def read(shard: int, row: int) -> torch.Tensor:
        found = files[shard].read_row_group(row, use_threads=False).column("hidden").chunk(0).flatten()
        return torch.from_numpy(found.to_numpy().copy()).view(TOKENS, WIDTH)

    return read


def table(shard: torch.Tensor) -> pa.Table:
    values = pa.array(shard.numpy().reshape(-1))
    offsets = pa.array(np.arange(len(shard) + 1, dtype=np.int32) * TOKENS * WIDTH)
    return pa.table({"hidden": pa.ListArray.from_arrays(offsets, values)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    shard_count, rounds = (2, 5) if arguments.quick else (8, 15)
    g = torch.Generator().manual_seed(0)
    shards = [
        torch.randint(-30000, 30000, (ROWS, TOKENS, WIDTH), generator=g, dtype=torch.int16) for _ in range(shard_count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        readers = {make.__name__: make(Path(folder), shards) for make in (safetensors, arrow, parquet)}
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(rounds):
            order = [(s, r) for s in range(shard_count) for r in range(ROWS)]
            random.Random(number).shuffle(order)
            order = order[:64]
            for name, read in readers.items():
                start = time.perf_counter()
                found = [read(*place) for place in order]
                seconds[name].append(time.perf_counter() - start)
                assert all(torch.equal(f, shards[s][r]) for f, (s, r) in zip(found, order, strict=True))
    rates = {name: 64 * TOKENS / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:12} {rate / 1e6:8.2f} M tokens/s, {rate * WIDTH * 2 / 1e9:.2f} GB/s")
    share = rates["safetensors"] / max(rates.values())
    if arguments.json:
        result = {"command": "python -m benchmarks.store_formats", "tokens_per_second": rates}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"store_formats: safetensors reads {share:.2f} of the fastest (goal: >= {GOAL}): "
        f"{'met' if share >= GOAL else 'MISSED'}"
    )
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
