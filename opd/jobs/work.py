"""Working through the shards of a job, with a progress bar, or with lines where the output is a log file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opd.progress import Lines, shows_bars


def work_through(
    missing: Sequence[int],
    shards: int,
    write: Callable[[int], None],
    label: str,
    quiet: bool,
) -> None:
    """Call `write` for each of the `missing` shards of `shards` in all."""
    console, done = Console(stderr=True), shards - len(missing)
    if not (quiet or shows_bars(console)):
        console.print(f"{label}: {len(missing)} of {shards} shards are to be written", highlight=False, soft_wrap=True)
        lines = Lines(console, done, shards, what=f"{label}, shard")
        for number, shard in enumerate(missing, start=done + 1):
            write(shard)
            lines.update(number, "")
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(
        *columns,
        TextColumn("shards"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet,
    ) as progress:
        task = progress.add_task(label, total=shards, completed=done)
        for shard in missing:
            write(shard)
            progress.advance(task)
