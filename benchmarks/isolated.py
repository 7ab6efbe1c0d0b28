"""Peak memory of one call in a process of its own.

A peak measured after another contestant has run says more about the allocator's leftovers than about the call. Each
measurement therefore gets a fresh process, forked from a server that has only imported modules, and counts what the
call adds to a process that has already built its inputs and run once on small ones.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

M_MMAP_THRESHOLD = -3
"""glibc's number for this setting. Left alone, the threshold moves with every buffer that is freed, and whether one of
16 MB goes back to the system at once comes down to what was freed before: the same call was seen to peak at 186 or at
488 MB. Fixed, a peak counts what is alive, as a device's counter does."""

Call = Callable[[], object]
Prepare = Callable[..., tuple[Call, Call]]
"""A module-level function that builds its inputs and returns a small warm-up call and the call to measure."""


@dataclass(frozen=True)
class Peak:
    """Bytes that a call added at its highest point, and where the number comes from."""

    growth: int
    source: str


def preload(modules: list[str]) -> None:
    """Import `modules` once, before any process is forked; those that are missing are ignored."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


def peak_memory(prepare: Prepare, arguments: tuple[Any, ...], device: str) -> Peak:
    """Run `prepare(*arguments)` in a fresh process and measure the call that it returns."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, prepare, arguments, device))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = "the process ended without an answer; out of memory?"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"{prepare.__name__}{arguments}: {answer}")
    return answer


def _work(sender: Connection, prepare: Prepare, arguments: tuple[Any, ...], device: str) -> None:
    try:
        torch.set_num_threads(1)
        _allocator("mallopt", M_MMAP_THRESHOLD, 2**18)
        warm, call = prepare(*arguments)
        warm()
        gc.collect()
        sender.send(_on_cuda(call) if device == "cuda" else _on_cpu(call))
    except Exception:
        sender.send(traceback.format_exc())


def _on_cuda(call: Call) -> Peak:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return Peak(peak, "max_memory_allocated")


def _on_cpu(call: Call) -> Peak:
    # Pages that the imports freed but the allocator kept would hide the first megabytes of growth.
    _allocator("malloc_trim", 0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    except OSError:
        before = _max_resident()
        call()
        return Peak(_max_resident() - before, "ru_maxrss")
    # Library code that runs for the first time becomes resident too, and is no memory that the call allocated.
    before, code = _status("VmRSS"), _status("RssFile")
    result = call()
    peak = _status("VmHWM") - (_status("RssFile") - code) - before
    del result
    return Peak(peak, "VmHWM")


def _allocator(function: str, *arguments: int) -> None:
    """Call a function of glibc's allocator, where the C library is glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, function):
        getattr(library, function)(*arguments)


def _max_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
