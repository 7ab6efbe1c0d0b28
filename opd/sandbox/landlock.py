"""Landlock, the kernel's own rules for a process that has no rights to give away: no program is needed for it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.sandbox import filters
from opd.sandbox.base import Confinement, files_of_python

CREATE_RULESET = 444
OLDEST = 3
"""Version since which a file that may not be written cannot be emptied either."""
WRITE_FILE, READ_FILE, READ_DIR, MAKE_DIR, MAKE_FILE, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 7, 1 << 8, 1 << 14
READ = READ_FILE | READ_DIR
DEVICES = (("/dev/null", READ_FILE | WRITE_FILE), ("/dev/urandom", READ_FILE), ("/dev/zero", READ_FILE))


class Landlock(Confinement):
    """Python's files can be read and nothing else, and nothing written but in the scratch folder; with Linux 6.7 no
    port is reached, with 6.12 no abstract socket and no process outside, whatever the filter of calls lets through."""

    kind = "landlock"

    def missing(self) -> str | None:
        if sys.platform != "linux":
            return "needs Linux"
        if not filters.supported():
            return "no list of system calls for this processor"
        if version() < OLDEST:
            return (
                f"this kernel has no Landlock of version {OLDEST} or later: Linux 6.2, with lsm=landlock among others"
            )
        return None

    @property
    def filter(self) -> bytes:
        return filters.compiled(files=True)

    def landlock(self, scratch: Path) -> Mapping[str, Any]:
        now = version()
        paths = [(str(path), READ if path.is_dir() else READ_FILE) for path in files_of_python()]
        paths += [(name, rights) for name, rights in DEVICES if Path(name).exists()]
        paths.append((str(scratch), READ | WRITE_FILE | MAKE_DIR | MAKE_FILE | TRUNCATE))
        # Of files all rights of that version; of TCP bind and connect; of scopes abstract sockets and signals.
        files = (1 << (16 if now >= 5 else 15)) - 1
        words = 3 if now >= 6 else 2 if now >= 4 else 1
        return {"handled": [files, 3, 3][:words] + [0] * (3 - words), "words": words, "paths": paths}


def version() -> int:
    """Of the kernel's Landlock, 0 where it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)))
