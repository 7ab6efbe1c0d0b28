"""Working through the shards of a job, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def work_through(
    missing: Sequence[int],
    shards: int,
    write: Callable[[int], None],
    label: str,
    quiet: bool,
) -> None:
    """Call `write` for each of the `missing` shards of `shards` in all."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(
        *columns,
        TextColumn("shards"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    ) as progress:
        task = progress.add_task(label, total=shards, completed=shards - len(missing))
        for shard in missing:
            write(shard)
            progress.advance(task)
